"""Speculation over processes, stages and replicas: tokens are those without it, and all ranks of a replica decide alike in every step.

Requests join, leave, are aborted and preempted. The whole product of proposers, depths and policies is in ``tests/property``.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import digested_model, scripted_proposers
from support.checkpoints import save_checkpoint
from support.engines import assert_idle
from support.leaks import LeakCheck
from support.local_engine import Answer, Request
from support.polling import wait_until
from support.speculation_cases import PROPOSERS, answer_plainly, assert_same, make_requests, save_stranger, speculate

import zspmd

SMALL_POOL: dict[str, Any] = {"num_blocks": 26}
CHUNKS: dict[str, Any] = {"num_blocks": 40, "max_num_batched_tokens": 20}
ABORTED = (4, 11, 17)  # requests, once they have some tokens


@dataclass(frozen=True)
class Case:
    """An engine: ``layout`` is tp, pp, dp, ep."""

    proposer: str
    k: int
    policy: str
    layout: tuple[int, int, int, int]
    draft_tp: int = 1
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "{}, k {}, {}, tp {}, pp {}, dp {}, ep {}, draft tp {}".format(
            self.proposer, self.k, self.policy, *self.layout, self.draft_tp
        )


QUICK: dict[str, tuple[Case, ...]] = {
    "llama": (
        Case("target", 4, "fixed", (2, 1, 1, 1), 2, {**SMALL_POOL, "window": 2}),
        Case("mixed", 3, "fixed", (1, 2, 1, 1), 1, {**CHUNKS, "window": 3}),
        Case("stranger+ngram", 5, "goodput", (1, 2, 1, 1), 1, SMALL_POOL),
        Case("oracle", 8, "batch", (1, 1, 2, 1), 1, {**SMALL_POOL, "window": 1}),
    ),
    "mixtral": (
        Case("oracle", 8, "fixed", (1, 1, 2, 2), 1, {**CHUNKS, "window": 3}),
        Case("mixed", 4, "goodput", (1, 1, 2, 2), 1, {**SMALL_POOL, "expert_dispatch": "all_to_all"}),
    ),
}
EVERY_LAYOUT = [
    *(((tp, 1, 1, 1), draft_tp) for tp in (1, 2, 4) for draft_tp in sorted({1, tp})),
    *(((1, 2, 1, 1), 1), ((2, 2, 1, 1), 2), ((1, 1, 2, 1), 1), ((1, 2, 2, 1), 1)),
]
CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {**SMALL_POOL, "window": 3},
    {**CHUNKS, "window": 2},
    {"enable_prefix_cache": False, "window": 1},
)


LONG: list[Any] = [
    pytest.param(
        tuple(
            Case(proposer, 1 + number % 8, ("fixed", "goodput", "batch")[number % 3], layout, draft_tp, CONFIGS[number // 3 % 4])
            for number, proposer in enumerate(proposers, start=sum(layout) + draft_tp)
        ),
        id="tp {}, pp {}, dp {}, ep {}, draft tp {}: {}".format(*layout, draft_tp, ", ".join(proposers)),
    )
    for (layout, draft_tp), proposers in itertools.product(
        EVERY_LAYOUT, (tuple(PROPOSERS)[:3], tuple(PROPOSERS)[3:], scripted_proposers.KINDS)
    )
]


async def ask(engine: zspmd.Engine, request: Request, number: int, *, is_aborted: bool) -> Answer:
    name = f"request {number}"
    params = request.params
    answer = Answer([], None)
    async for output in engine.generate(request.prompt, params, request_id=name):
        completion = output.outputs[0]
        assert completion.token_ids[: len(answer.token_ids)] == answer.token_ids
        answer = Answer(completion.token_ids, completion.finish_reason, [entry.logprob for entry in completion.logprobs or ()])
        assert completion.logprobs is None or [entry.token_id for entry in completion.logprobs] == completion.token_ids
        if is_aborted and len(answer.token_ids) >= 3 and not output.finished:
            engine.abort(name)
    return answer


async def ask_all(engine: zspmd.Engine, requests: Sequence[Request], *, chance: random.Random | None = None) -> list[Answer]:
    """Return the answers; with ``chance`` requests join one after another, and some are aborted."""
    tasks = []
    for number, request in enumerate(requests):
        tasks.append(asyncio.create_task(ask(engine, request, number, is_aborted=chance is not None and number in ABORTED)))
        if chance is not None:
            await asyncio.sleep(chance.random() * 0.01)
    answers = await asyncio.gather(*tasks)
    await wait_until(lambda: not engine.statistics().num_steps_in_flight)
    return list(answers)


async def assert_ranks_agree(engine: zspmd.Engine) -> None:
    """Check that in every step all ranks of a replica have decided alike; takes note of what was digested."""
    digests = await engine.group.call("take_digests")
    size = engine.parallel.tp * engine.parallel.pp
    for start in range(0, len(digests), size):
        first, *others = digests[start : start + size]
        assert len(first) > 10
        assert others == [first] * len(others)


@dataclass(frozen=True)
class Reference:
    directory: Path
    stranger: Path
    requests: list[Request]
    answers: list[Answer]

    def build(self, case: Case, patch: pytest.MonkeyPatch, **options: Any) -> zspmd.Engine:
        """Return an engine whose ranks digest what they decide; enter it before the next one is built."""
        scripted = case.proposer in scripted_proposers.KINDS
        patch.setattr(
            "zspmd.runtime.engine.engine.WORKER", scripted_proposers.worker_of(case.proposer) if scripted else digested_model.WORKER
        )
        proposer = PROPOSERS["ngram" if scripted else case.proposer](self.directory, self.stranger, case.k, case.draft_tp)
        config = {"max_num_seqs": 8, "num_blocks": 200, "block_size": 4, "max_model_len": 96, **case.config}
        tp, pp, dp, ep = case.layout
        return zspmd.Engine(
            self.directory,
            parallel=zspmd.ParallelConfig(tp=tp, pp=pp, dp=dp, ep=ep),
            config=zspmd.EngineConfig(speculation=speculate(proposer, case.policy), **config),
            devices="cpu",
            deadlines=zspmd.Deadlines(ready_s=100.0, step_s=60.0, beat_s=0.2, drain_s=1.0, kill_s=0.5),
            **options,
        )


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Reference]:
    directory, stranger = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("stranger")
    save_checkpoint(directory, request.param)
    save_stranger(stranger)
    requests = make_requests()
    return request.param, Reference(directory, stranger, requests, answer_plainly(directory, requests))


async def run_case(reference: Reference, case: Case, patch: pytest.MonkeyPatch) -> None:
    """Send all requests twice, the second time all at once and with their beginnings known."""
    async with reference.build(case, patch) as engine:
        assert_same(await ask_all(engine, reference.requests, chance=random.Random(case.k)), reference.answers)
        assert_same(await ask_all(engine, reference.requests), reference.answers)
        await assert_ranks_agree(engine)
        assert_idle(engine)
        statistics = engine.statistics()
        if case.config.get("num_blocks") == SMALL_POOL["num_blocks"] and case.layout[1:3] == (1, 1) and case.k > 2:
            assert statistics.num_preemptions > 0
        assert statistics.speculation is not None
        if case.policy == "fixed" and case.proposer != "ngram":
            assert statistics.speculation.num_rows > 0
        if case.proposer == "oracle":
            assert statistics.speculation.accepted == statistics.speculation.drafted


async def run_cases(reference: Reference, cases: Sequence[Case], patch: pytest.MonkeyPatch) -> int:
    """Return how many were run; engines start together, since each spends most of its time importing torch on one core."""
    results = await asyncio.gather(*(run_case(reference, case, patch) for case in cases), return_exceptions=True)
    for case, result in zip(cases, results, strict=True):
        if result is not None:
            raise AssertionError(f"{case}: {result}") from result
    return len(results)


def test_tokens_are_those_without_speculation(reference: tuple[str, Reference], monkeypatch: pytest.MonkeyPatch) -> None:
    family, built = reference
    assert asyncio.run(run_cases(built, QUICK[family], monkeypatch)) == len(QUICK[family])


@pytest.mark.long
@pytest.mark.parametrize("reference", ["llama"], indirect=True)
@pytest.mark.parametrize("cases", LONG)
def test_tokens_are_those_without_speculation_in_every_layout(
    reference: tuple[str, Reference], cases: tuple[Case, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asyncio.run(run_cases(reference[1], cases, monkeypatch)) == len(cases)


@pytest.mark.long
@pytest.mark.parametrize("reference", ["dots1", "deepseek-v3"], indirect=True)
@pytest.mark.parametrize("layout", [(2, 1, 2, 4), (1, 2, 2, 2), (1, 1, 2, 2)], ids="tp {0[0]}, pp {0[1]}, dp {0[2]}, ep {0[3]}".format)
@pytest.mark.parametrize("dispatch", ["gather", "all_to_all"])
def test_replicas_that_share_experts_speculate(
    reference: tuple[str, Reference], layout: tuple[int, int, int, int], dispatch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"expert_dispatch": dispatch}
    cases = (Case("mixed", 5, "fixed", layout, 1, {**CHUNKS, **options}), Case("stranger", 3, "batch", layout, 1, options))
    assert asyncio.run(run_cases(reference[1], cases, monkeypatch)) == len(cases)


async def wait_generated(engine: zspmd.Engine, count: int) -> None:
    await wait_until(lambda: engine.statistics().num_generated_tokens >= count, 60)


async def wait_restarts(engine: zspmd.Engine, count: int) -> None:
    await wait_until(lambda: engine.statistics().num_restarts >= count, 60)


RESTARTED = [
    pytest.param(Case("target", 4, "goodput", (2, 1, 1, 1), 2, SMALL_POOL), 1, id="a draft over two ranks"),
    pytest.param(Case("mixed", 4, "fixed", (1, 2, 1, 1), 1, SMALL_POOL), 1, id="stages", marks=pytest.mark.long),
    pytest.param(Case("stranger+ngram", 4, "batch", (2, 1, 1, 1), 1, CHUNKS), 4, id="often", marks=pytest.mark.long),
]


@pytest.mark.parametrize("reference", ["llama"], indirect=True)
@pytest.mark.parametrize(("case", "num_kills"), RESTARTED)
async def test_streams_go_on_when_ranks_are_killed(
    leak_check: LeakCheck, reference: tuple[str, Reference], monkeypatch: pytest.MonkeyPatch, case: Case, num_kills: int
) -> None:
    built, chance, lines = reference[1], random.Random(9), list[str]()
    restart = zspmd.RestartPolicy(max_restarts=20, window_s=600.0)
    async with built.build(case, monkeypatch, restart=restart, on_restart=lines.append) as engine:
        running = asyncio.create_task(ask_all(engine, built.requests))
        for turn in range(num_kills):
            await wait_generated(engine, engine.statistics().num_generated_tokens + 60)
            pid = engine.group.health()[chance.randrange(engine.parallel.world_size)].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await wait_restarts(engine, turn + 1)
        assert_same(await running, built.answers)
        await assert_ranks_agree(engine)
        assert_idle(engine)
    assert len(lines) == num_kills
