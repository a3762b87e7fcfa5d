"""An engine that outlives its workers: every stream goes on where it stopped, and a request that ends them fails alone."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import plain_model, poison
from support.engines import assert_idle, collect, complete
from support.leaks import LeakCheck
from support.plain_model import continuation
from support.polling import wait_until

import zspmd

SENTENCE = "an asyncio message-passing runtime"
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.9, "top_p": 0.9, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 3},
    {"temperature": 0.7, "top_k": 20, "logprobs": 2},
    {"temperature": 0, "stop": [SENTENCE[-7:]]},
    {"temperature": 1.0, "n": 2, "min_tokens": 20, "ignore_eos": False},
    {"temperature": 0.8, "min_p": 0.02, "stop_token_ids": [40]},
]
PROMPTS = ("zspmd is", "123+456=")
NUM_TOKENS = 60
REQUESTS = [
    (PROMPTS[number // 8], zspmd.SamplingParams(**{"max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": number, **KINDS[number % 8]}))
    for number in range(16)
]
TP = zspmd.ParallelConfig(tp=2)
MANY = zspmd.RestartPolicy(max_restarts=20, window_s=600.0)
LONG = zspmd.SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
SHORT = zspmd.SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
PROMPT = [7, 11, 13]
WAIT_S = 60.0


def build(
    *,
    restart: zspmd.RestartPolicy | None = MANY,
    lines: list[str] | None = None,
    window: int = 2,
    parallel: zspmd.ParallelConfig = TP,
    **deadlines: float,
) -> zspmd.Engine:
    return zspmd.Engine(
        "demo",
        parallel=parallel,
        config=zspmd.EngineConfig(max_num_seqs=12, num_blocks=400, window=window),  # fewer slots than sequences, so that some wait
        devices="cpu",
        deadlines=zspmd.Deadlines(**{"beat_s": 0.2, "ready_s": 100.0, "step_s": 60.0, "drain_s": 1.0, "kill_s": 0.5, **deadlines}),
        on_log=lambda rank, stream, line: None,
        restart=restart,
        on_restart=([] if lines is None else lines).append,
    )


async def run_all(engine: zspmd.Engine) -> list[list[zspmd.RequestOutput]]:
    """Return every output of every request."""
    return list(await asyncio.gather(*(collect(engine, prompt, params) for prompt, params in REQUESTS)))


def pid_of(engine: zspmd.Engine, rank: int) -> int:
    pid = engine.group.health()[rank].pid
    assert pid is not None
    return pid


def num_generated(engine: zspmd.Engine) -> int:
    return engine.statistics().num_generated_tokens


async def wait_tokens(engine: zspmd.Engine, count: int) -> None:
    """Wait until the engine has generated ``count`` more tokens."""
    goal = num_generated(engine) + count
    await wait_until(lambda: num_generated(engine) >= goal, WAIT_S)


async def wait_restarts(engine: zspmd.Engine, count: int) -> None:
    """Wait until the engine has taken in that its ranks are gone, and is about to replace them."""
    await wait_until(lambda: engine.statistics().num_restarts >= count, WAIT_S)


@pytest.fixture(scope="module")
def undisturbed() -> list[zspmd.RequestOutput]:
    """What the requests give where nothing goes wrong."""

    async def run() -> list[zspmd.RequestOutput]:
        async with build(restart=None) as engine:
            return [outputs[-1] for outputs in await run_all(engine)]

    return asyncio.run(run())


def assert_same(got: Sequence[list[zspmd.RequestOutput]], wanted: Sequence[zspmd.RequestOutput]) -> None:
    """Check that each stream ended as it should and never took anything back."""
    for outputs, reference in zip(got, wanted, strict=True):
        for before, after in itertools.pairwise(outputs):
            for old, new in zip(before.outputs, after.outputs, strict=True):
                assert new.token_ids[: len(old.token_ids)] == old.token_ids
                assert new.text.startswith(old.text)
        assert outputs[-1].finished
        for completion, expected in zip(outputs[-1].outputs, reference.outputs, strict=True):
            assert completion.token_ids == expected.token_ids
            assert completion.text == expected.text
            assert (completion.finish_reason, completion.stop_reason) == (expected.finish_reason, expected.stop_reason)
            assert_same_logprobs(completion.logprobs, expected.logprobs)


def assert_same_logprobs(got: list[Any] | None, wanted: list[Any] | None) -> None:
    assert (got is None) == (wanted is None)
    for one, other in zip(got or [], wanted or [], strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert list(one.top.values()) == pytest.approx(list(other.top.values()), abs=1e-4)


@pytest.fixture
def plain_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks without torch, for what does not depend on what they compute: a restart spends its time on importing it."""
    plain_model.use_plain_ranks(monkeypatch)


async def test_the_requests_are_of_every_kind(undisturbed: list[zspmd.RequestOutput]) -> None:
    reasons = {completion.finish_reason for output in undisturbed for completion in output.outputs}
    assert reasons == {"stop", "length"}
    assert any(output.outputs[0].stop_reason == SENTENCE[-7:] for output in undisturbed)
    assert sum(len(output.outputs) for output in undisturbed) == 18


@pytest.mark.parametrize(
    ("number", "num_kills", "parallel"),
    [
        pytest.param(signal.SIGKILL, 1, TP, id="SIGKILL"),
        pytest.param(signal.SIGKILL, 1, zspmd.ParallelConfig(pp=2), id="SIGKILL, a stage"),
        pytest.param(signal.SIGKILL, 1, zspmd.ParallelConfig(dp=2), id="SIGKILL, a replica"),
        pytest.param(signal.SIGKILL, 12, TP, id="SIGKILL, often", marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, 6, zspmd.ParallelConfig(pp=2, dp=2), id="SIGKILL, stages of replicas", marks=pytest.mark.long),
        pytest.param(signal.SIGSEGV, 6, TP, id="SIGSEGV", marks=pytest.mark.long),
    ],
)
async def test_streams_go_on_where_they_stopped(
    leak_check: LeakCheck, undisturbed: list[zspmd.RequestOutput], number: signal.Signals, num_kills: int, parallel: zspmd.ParallelConfig
) -> None:
    chance, lines = random.Random(number), list[str]()
    async with build(lines=lines, parallel=parallel) as engine:
        running = asyncio.create_task(run_all(engine))
        for turn in range(num_kills):
            await wait_tokens(engine, chance.randrange(1, 800 // num_kills))  # of 1,000 in all, and some pass before they are counted
            os.kill(pid_of(engine, chance.randrange(parallel.world_size)), number)
            await wait_restarts(engine, turn + 1)
        got = await running
        assert engine.statistics().num_restarts == num_kills
        await wait_until(lambda: engine.statistics().num_steps_in_flight == 0)
        assert_idle(engine)
    assert_same(got, undisturbed)
    assert len(lines) == num_kills
    assert all(f"was ended by {number.name}" in line and "restarting the workers" in line for line in lines)


async def test_the_loss_of_the_agent_and_then_of_a_starting_rank_are_two_faults(
    leak_check: LeakCheck, undisturbed: list[zspmd.RequestOutput]
) -> None:
    lines: list[str] = []
    async with build(lines=lines) as engine:
        running = asyncio.create_task(run_all(engine))
        await wait_tokens(engine, 100)
        before = engine.group
        (agent,) = (pid for pid in leak_check.processes() if parent_of(pid) == os.getpid())
        os.kill(agent, signal.SIGKILL)
        await wait_until(lambda: engine.group is not before and is_there(engine, 1), WAIT_S)
        os.kill(pid_of(engine, 1), signal.SIGKILL)
        assert_same(await running, undisturbed)
    assert len(lines) == 2
    assert "the agent" in lines[0]
    assert "rank 1" in lines[1]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.usefixtures("plain_ranks")
async def test_a_rank_that_is_stopped_is_replaced(leak_check: LeakCheck) -> None:
    lines: list[str] = []
    async with build(lines=lines, step_s=1.5) as engine:
        stream = asyncio.create_task(complete(engine, PROMPT, SHORT))
        await wait_tokens(engine, 20)
        os.kill(pid_of(engine, 1), signal.SIGSTOP)
        assert (await stream).token_ids == continuation(PROMPT, 100)
    assert len(lines) == 1
    assert re.search(r"no answer to step \d+ within [\d.]+ s; not done with it:", lines[0]), lines[0]
    assert "tried" not in lines[0], "it may have been stopped from outside"


def is_there(engine: zspmd.Engine, rank: int) -> bool:
    try:
        return engine.group.health()[rank].pid is not None
    except zspmd.ClosedError:  # the group's sockets are not open yet
        return False


@pytest.mark.usefixtures("plain_ranks")
async def test_beyond_the_policy_every_stream_raises_the_last_fault_with_the_earlier_ones(leak_check: LeakCheck) -> None:
    lines: list[str] = []
    async with build(restart=zspmd.RestartPolicy(max_restarts=1), lines=lines) as engine:
        streams = [asyncio.create_task(complete(engine, [i + 1, 5], LONG)) for i in range(15)]
        await wait_tokens(engine, 30)
        first = pid_of(engine, 0)
        os.kill(first, signal.SIGKILL)
        await wait_restarts(engine, 1)
        await wait_tokens(engine, 30)
        last = pid_of(engine, 1)
        os.kill(last, signal.SIGKILL)
        errors = await asyncio.gather(*streams, return_exceptions=True)
    assert len({id(error) for error in errors}) == 1
    (error, *_) = errors
    assert isinstance(error, zspmd.WorkerExitedError)
    assert (error.rank, error.pid) == (1, last)
    assert isinstance(error.__cause__, zspmd.WorkerExitedError)
    assert (error.__cause__.rank, error.__cause__.pid) == (0, first)
    assert [line.partition("; ")[2][:13] for line in lines] == ["restarting th", "not restarted"]


@pytest.mark.parametrize(
    ("way", "num_outputs", "window", "kind"),
    [
        pytest.param("segfault", 0, 2, zspmd.WorkerExitedError, id="segfault in its prefill"),
        pytest.param("exit", 12, 1, zspmd.WorkerExitedError, id="exit with one step in flight"),
        pytest.param("raise", 5, 2, zspmd.WorkerRaisedError, id="raise"),
        pytest.param("hang", 3, 2, zspmd.WorkerStalledError, id="hang"),
    ],
)
async def test_a_request_that_ends_its_workers_fails_alone(
    leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch, way: str, num_outputs: int, window: int, kind: type[zspmd.WorkerError]
) -> None:
    plain_model.use_plain_ranks(monkeypatch, poison.WORKER)
    lines: list[str] = []
    params = zspmd.SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    async with build(restart=zspmd.RestartPolicy(max_restarts=1), lines=lines, window=window, step_s=1.5) as engine:
        others = [asyncio.create_task(complete(engine, [i + 2, 9], params)) for i in range(2)]
        bad = asyncio.create_task(complete(engine, poison.poison_prompt(way, num_outputs), params, request_id="bad"))
        await asyncio.sleep(0)
        others += [asyncio.create_task(complete(engine, [i + 2, 9], params)) for i in (2, 3)]
        with pytest.raises(zspmd.RequestError, match=r"request bad ended its workers twice while it ran alone: rank [01] on ") as caught:
            await bad
        assert caught.value.request_id == "bad"
        assert type(caught.value.__cause__) is kind
        assert [output.token_ids for output in await asyncio.gather(*others)] == [continuation([i + 2, 9], 40) for i in range(4)]
        assert engine.statistics().num_restarts == 3
        assert (await complete(engine, [2, 9], params)).token_ids == continuation([2, 9], 40)
        await wait_until(lambda: engine.statistics().num_steps_in_flight == 0)
        assert_idle(engine)
    assert ["were being computed" in line for line in lines] == [True, False, False]
    assert "but bad fails: it ended its workers twice while it ran alone" in lines[2]


@pytest.mark.usefixtures("plain_ranks")
async def test_deaths_from_outside_never_fail_a_request_that_runs_alone(leak_check: LeakCheck) -> None:
    async with build() as engine:
        stream = asyncio.create_task(complete(engine, PROMPT, SHORT))
        for turn in range(2):
            await wait_tokens(engine, 1)
            os.kill(pid_of(engine, turn % 2), signal.SIGKILL)
            await wait_restarts(engine, turn + 1)
        assert (await stream).token_ids == continuation(PROMPT, 100)


@pytest.mark.usefixtures("plain_ranks")
async def test_an_idle_engine_gets_new_ranks_before_anybody_asks(leak_check: LeakCheck) -> None:
    async with build() as engine:
        before = engine.group
        os.kill(pid_of(engine, 1), signal.SIGKILL)
        await wait_until(lambda: engine.group is not before and engine.group.fault is None and is_there(engine, 1), WAIT_S)
        assert (await complete(engine, PROMPT, SHORT)).token_ids == continuation(PROMPT, 100)
        assert engine.statistics().num_restarts == 1


@pytest.mark.usefixtures("plain_ranks")
async def test_requests_that_come_during_a_restart_wait_and_can_be_aborted(leak_check: LeakCheck) -> None:
    async with build() as engine:
        first = asyncio.create_task(complete(engine, [1, 5], LONG, request_id="first"))
        await wait_tokens(engine, 10)
        os.kill(pid_of(engine, 0), signal.SIGKILL)
        await wait_restarts(engine, 1)
        second = asyncio.create_task(complete(engine, PROMPT, SHORT, request_id="second"))
        await wait_until(lambda: engine.statistics().num_waiting == 2)
        assert engine.abort("first")
        assert (await first).finish_reason == "abort"
        assert (await second).token_ids == continuation(PROMPT, 100)


@pytest.mark.usefixtures("plain_ranks")
@pytest.mark.parametrize("is_started", [False, True], ids=["while the old ranks end", "while the new ones start"])
async def test_closing_during_a_restart_leaves_nothing(leak_check: LeakCheck, is_started: bool) -> None:
    engine = build()
    await engine.start()
    streams = [asyncio.create_task(complete(engine, [i + 1, 5], LONG)) for i in range(3)]
    await wait_tokens(engine, 10)
    before = engine.group
    os.kill(pid_of(engine, 0), signal.SIGKILL)
    await wait_restarts(engine, 1)
    if is_started:
        await wait_until(lambda: engine.group is not before and is_there(engine, 0), WAIT_S)
    await engine.aclose()
    assert leak_check.processes() == {}
    errors = await asyncio.gather(*streams, return_exceptions=True)
    assert [type(error) for error in errors] == [zspmd.ClosedError] * 3


async def test_a_recording_holds_one_launch(tmp_path: Path) -> None:
    with pytest.raises(zspmd.ConfigError, match="a recording holds one launch: leave one of them out"):
        zspmd.Engine("demo", record=tmp_path / "run.zsr", restart=zspmd.RestartPolicy())
