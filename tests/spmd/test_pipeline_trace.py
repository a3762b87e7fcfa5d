"""Stages of a pipeline at work, as a trace shows them: with requests for all of them none waits, with one they take turns.

A stage's forward pass is padded with sleep, so that the stages are balanced and no processor is short.
"""

from __future__ import annotations

import statistics
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from support import padded_model
from support.checkpoints import save_checkpoint
from support.engines import assert_idle, complete_all
from support.leaks import LeakCheck
from support.traces import Event, Trace, end_of, read_trace

import zspmd

WORK = ("build inputs", "forward", "sample")  # what else a step of a rank takes is waiting for others
MAX_TOKENS = 6
MARK = "quiet"  # on the driver's row, between two loads


class Load:
    """What a trace shows of some requests that began together and were equally long.

    Args:
        trace: of the whole launch.
        begin, end: when all was quiet before and after them, in microseconds of the trace.
        num_stages: stages of the pipeline.
        num_requests: how many there were.
    """

    def __init__(self, trace: Trace, begin: float, end: float, num_stages: int, num_requests: int) -> None:
        self._round = min(num_stages, num_requests)
        spans = [[s for s in trace.spans(f"rank {stage} (localhost)") if s["name"] in WORK] for stage in range(num_stages)]
        self._stages = [[span for span in of_stage if begin <= span["ts"] < end] for of_stage in spans]
        in_flight = [e for e in trace.events if e["name"] == "in flight" and e["ph"] in "be" and begin <= e["ts"] < end]
        self._in_flight = sorted((e["ts"], 1 if e["ph"] == "b" else -1) for e in in_flight)

    @property
    def num_steps(self) -> int:
        return len(_forwards(self._stages[0]))

    def busy_shares(self) -> list[float]:
        """Return by stage the share of the time in which it worked while the pipe was full, in the median round.

        The pipe is full from the second step of the last stage, whose first one has the prompts of all, to the first stage's last one. A
        round is as many steps as there are stages; a machine that does something else meanwhile costs one of them.
        """
        begin, end = _forwards(self._stages[-1])[1]["ts"], _forwards(self._stages[0])[-1]["ts"]
        return [self._busy_share(spans, begin, end) for spans in self._stages]

    def _busy_share(self, spans: list[Event], begin: float, end: float) -> float:
        begins: list[float] = [span["ts"] for span in _forwards(spans) if begin <= span["ts"] <= end][:: self._round]
        shares: list[float] = []
        for before, after in pairwise(begins):
            worked = sum(max(0.0, min(end_of(span), after) - max(span["ts"], before)) for span in spans)
            shares.append(worked / (after - before))
        return statistics.median(shares)

    def most_in_flight(self) -> int:
        """Return how many steps at most were published and not answered."""
        return max(accumulate(change for _, change in self._in_flight))


def _forwards(spans: list[Event]) -> list[Event]:
    return [span for span in spans if span["name"] == "forward"]


async def trace_loads(directory: Path, num_stages: int, counts: tuple[int, ...]) -> list[Load]:
    """Return what a trace shows of several loads, one after another, each of as many requests as ``counts`` says."""
    save_checkpoint(directory, "llama", num_hidden_layers=num_stages)
    engine = zspmd.Engine(
        directory,
        parallel=zspmd.ParallelConfig(pp=num_stages),
        config=zspmd.EngineConfig(num_blocks=64, enable_prefix_cache=False),
        devices="cpu",
        trace=directory / "trace.json",
    )
    async with engine:
        engine.group.trace.mark(MARK)
        for count in counts:
            prompts = [[number + 1, 2, 3] for number in range(count)]
            await complete_all(engine, prompts, zspmd.SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True))
            assert_idle(engine)
            engine.group.trace.mark(MARK)
    trace = read_trace(directory / "trace.json")
    quiet = [e["ts"] for e in trace.events if e["ph"] == "i" and e["name"] == MARK]
    return [Load(trace, begin, end, num_stages, count) for (begin, end), count in zip(pairwise(quiet), counts, strict=True)]


@pytest.mark.parametrize(
    ("num_stages", "counts"),
    [
        pytest.param(2, (8, 3), id="2 stages"),
        pytest.param(3, (3, 7), id="3 stages", marks=pytest.mark.long),
        pytest.param(4, (4, 6, 13), id="4 stages", marks=pytest.mark.long),
    ],
)
async def test_every_stage_is_busy_once_the_pipe_is_full(
    leak_check: LeakCheck,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    num_stages: int,
    counts: tuple[int, ...],
) -> None:
    monkeypatch.setattr("zspmd.runtime.engine.engine.WORKER", padded_model.WORKER)
    *loads, alone = await trace_loads(tmp_path, num_stages, (*counts, 1))
    for count, load in zip((*counts, 1), (*loads, alone), strict=True):
        shares = ", ".join(f"{share:.3f}" for share in load.busy_shares())
        request.node.user_properties.append(("figures", f"requests {count}: stages busy {shares} of the time"))
    for load in loads:
        assert min(load.busy_shares()) >= 0.9, load.busy_shares()
        assert load.most_in_flight() == num_stages + 1  # the next step of a part is there before the answer to its last one
        assert load.num_steps == 1 + num_stages * (MAX_TOKENS - 1)  # the prompts of all, then the stages' shares of the requests in turn
    assert max(alone.busy_shares()) < 0.6, alone.busy_shares()  # with one request the stages take turns
    assert alone.most_in_flight() == 2
