"""``trace=FILE``: one timeline of driver and ranks, whatever becomes of the launch."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path

import pytest
from support.traced_workers import Busy, Doomed, Summer
from support.traces import Trace, check_events, end_of, read_trace

import zspmd

RANKS = ("rank 0 (localhost)", "rank 1 (localhost)")


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The trace of five steps and two calls on two ranks."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"

    async def run() -> None:
        async with zspmd.launch(Summer, world_size=2, trace=path) as group:
            for number in range(5):
                with group.trace.span("prepare"):
                    pass
                assert await group.step(number) == [number]
            assert await group.call("is_traced") == [True, True]
            await group.call("in_thread", ranks=[1])

    asyncio.run(run())
    return read_trace(path)


def test_there_is_a_row_for_the_driver_and_for_each_rank(summed: Trace) -> None:
    assert set(summed.rows) == {"driver", *RANKS}
    assert summed.process("driver")["events_dropped"] == 0
    assert all(summed.process(rank)["is_complete"] and summed.process(rank)["clock_error_us"] == 0 for rank in RANKS)
    assert len({summed.process(name)["pid"] for name in summed.rows}) == 3


def test_the_driver_shows_each_step_and_who_has_answered(summed: Trace) -> None:
    for name in ("encode", "publish"):
        assert [span["args"].get("step") for span in summed.spans("driver", name)] == [0, 1, 2, 3, 4, None, None]
    assert [span["args"].get("call") for span in summed.spans("driver", "publish")][5:] == ["is_traced", "in_thread"]
    collected = [(span["args"]["seq"], span["args"]["rank"]) for span in summed.spans("driver", "collect")]
    assert sorted(collected) == [(seq, rank) for seq in range(1, 8) for rank in (0, 1)]
    assert len(summed.spans("driver", "prepare")) == 5
    assert {"started", "ready", "closing"} <= set(summed.marks("driver"))


@pytest.mark.parametrize("rank", RANKS)
def test_a_rank_goes_from_waiting_to_the_step_to_its_answer(summed: Trace, rank: str) -> None:
    frames = [s for s in summed.spans(rank) if s["name"] in ("wait", "step", "push", "is_traced", "in_thread")]
    names = [name for what in (["step"] * 5 + ["is_traced", "in_thread"]) for name in ("wait", what, "push")]
    assert [s["name"] for s in frames] == names
    assert all(end_of(before) <= after["ts"] + 1e-3 for before, after in pairwise(frames))
    assert [s["args"]["step"] for s in frames if s["name"] == "step"] == [0, 1, 2, 3, 4]
    assert summed.marks(rank) == ["odd", "odd"]


@pytest.mark.parametrize("rank", RANKS)
def test_spans_of_the_worker_and_its_collectives_lie_inside_their_step(summed: Trace, rank: str) -> None:
    reduced = summed.spans(rank, "all_reduce")
    assert [s["args"] for s in reduced] == [{"step": n, "seq": n + 1, "axis": "tp", "bytes": 64} for n in range(5)]
    for parts in zip(*(summed.spans(rank, name) for name in ("step", "forward", "layer", "all_reduce")), strict=True):
        assert all(o["ts"] <= i["ts"] and end_of(i) <= end_of(o) + 1e-3 for o, i in pairwise(parts))
    assert [len(summed.spans(rank, name)) for name in ("create worker", "setup", "teardown")] == [1, 1, 1]


def test_a_thread_of_its_own_has_a_lane_of_its_own(summed: Trace) -> None:
    (beside,) = summed.spans(RANKS[1], "beside")
    names = {e["tid"]: e["args"]["name"] for e in summed.events if e["name"] == "thread_name" and e["pid"] == summed.rows[RANKS[1]]}
    assert names[beside["tid"]] == "helping"
    assert names[1] == "steps"


def test_every_step_is_bound_to_its_ranks_and_back(summed: Trace) -> None:
    arrows = {(e["cat"], e["id"]) for e in summed.events if e["ph"] == "s"}
    assert arrows == {(way, f"1.{seq}.{rank}") for way in ("publish", "answer") for seq in range(1, 8) for rank in (0, 1)}


async def test_without_a_trace_spans_are_nothing() -> None:
    async with zspmd.launch(Summer, world_size=2) as group:
        assert await group.call("is_traced") == [False, False]
        assert not group.trace.is_on
        with group.trace.span("nothing"):
            assert await group.step(1) == [1]


async def test_only_the_last_events_are_kept_and_the_file_says_how_many_there_were(tmp_path: Path) -> None:
    config = zspmd.TraceConfig(tmp_path / "trace.json", max_events=100)
    async with zspmd.launch(Busy, world_size=1, preload=(), trace=config) as group:
        await group.step(300)
        await group.step(40)
    trace = read_trace(tmp_path / "trace.json")
    assert trace.launches[0]["max_events"] == 128
    process = trace.process("rank 0 (localhost)")
    assert process["events_kept"] == 127
    assert process["events_kept"] + process["events_dropped"] == 2 + 300 + 40 + 3  # steps; create worker, setup, teardown
    assert [s["args"]["step"] for s in trace.spans("rank 0 (localhost)", "step")] == [1]  # the first is overwritten
    assert len([s for s in trace.spans("rank 0 (localhost)", "unit") if s["args"].get("step") == 1]) == 40


@pytest.mark.parametrize(("way", "error"), [("raise", zspmd.WorkerRaisedError), ("kill", zspmd.WorkerExitedError)])
async def test_after_a_fault_everything_up_to_it_is_there(tmp_path: Path, way: str, error: type[Exception]) -> None:
    path = tmp_path / "trace.json"

    async def run() -> None:
        async with zspmd.launch(Doomed, world_size=2, worker_args={"way": way}, output_ranks="all", preload=(), trace=path) as group:
            for number in range(4):
                await group.step(number)

    with pytest.raises(error):
        await run()
    trace = read_trace(path)
    *done, last = trace.spans(RANKS[1], "step")
    assert [s["args"] for s in done] == [{"step": 0, "seq": 1}, {"step": 1, "seq": 2}]
    assert last["args"] == {"step": 2, "seq": 3, "unfinished": True}
    assert ("unfinished" in trace.spans(RANKS[1], "fateful")[-1]["args"]) is (way == "kill")
    assert ("raised ValueError" in trace.marks(RANKS[1])) is (way == "raise")
    assert trace.process(RANKS[1])["is_complete"] is False or way == "raise"
    assert "failed" in trace.marks("driver")


async def test_an_interrupted_launch_leaves_a_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    is_there = asyncio.Event()

    async def run() -> None:
        async with zspmd.launch(Summer, world_size=2, trace=path) as group:
            await group.step(0)
            is_there.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(run())
    await is_there.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    trace = read_trace(path)
    assert [len(trace.spans(rank, "step")) for rank in RANKS] == [1, 1]
    assert not trace.process(RANKS[0])["is_complete"]


async def test_a_launch_that_cannot_start_leaves_a_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(zspmd.WorkerError):
        async with zspmd.launch("support.no_such_module:Worker", world_size=1, preload=(), trace=path):
            pass
    assert "failed" in read_trace(path).marks("driver")


async def test_with_look_ahead_the_ranks_of_an_engine_run_back_to_back(tmp_path: Path) -> None:
    """With a window of 2 a step is published before the answer to the one before is looked at, so that ranks may find it there."""
    path = tmp_path / "trace.json"
    params = zspmd.SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)
    config = zspmd.EngineConfig(num_blocks=64, window=2)
    parallel = zspmd.ParallelConfig(tp=2)
    async with zspmd.Engine("demo", config=config, parallel=parallel, devices="cpu", trace=path) as engine:
        async for _ in engine.generate([1, 2, 3], params):
            pass
    trace = read_trace(path)
    published = {s["args"]["step"]: s["ts"] for s in trace.spans("driver", "publish") if "step" in s["args"]}
    applied = [s["ts"] for s in trace.spans("driver", "apply")]
    assert all(published[n + 1] < applied[n] for n in range(118))  # whatever else the machine does
    for rank in RANKS:
        steps = {s["args"]["step"]: s for s in trace.spans(rank, "step")}
        assert len(steps) >= 120
        assert any(published[n + 1] < end_of(steps[n]) for n in range(118))  # nearly all where a processor is free for the driver
        inside = {s["name"] for s in trace.spans(rank) if s["args"].get("step") == 50}
        assert {"wait", "step", "build inputs", "forward", "all_reduce", "sample", "push"} <= inside
    assert {"schedule", "apply", "encode", "publish", "collect"} <= {s["name"] for s in trace.spans("driver")}


async def test_without_look_ahead_they_wait_for_every_step(tmp_path: Path) -> None:
    """What the test above would find if nothing were published ahead."""
    path = tmp_path / "trace.json"
    async with zspmd.launch(Summer, world_size=1, trace=path) as group:
        for number in range(20):
            await group.step(number)
    trace = read_trace(path)
    steps, published = trace.spans(RANKS[0], "step"), trace.spans("driver", "publish")
    assert all(end_of(before) <= after["ts"] for before, after in zip(steps, published[1:]))


async def test_an_earlier_trace_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for _ in range(2):
        async with zspmd.launch(Busy, world_size=1, preload=(), trace=path) as group:
            await group.step(1)
        assert len(read_trace(path).launches) == 1
    path.write_text("{}")
    with pytest.raises(zspmd.ConfigError, match=r"a file is that is no trace of zspmd"):
        zspmd.launch(Busy, world_size=1, trace=path)
    assert path.read_text() == "{}"


def test_the_trace_of_what_replaces_failed_workers_goes_on_in_the_same_file(tmp_path: Path) -> None:
    """As an engine does it: another group with the same settings."""
    path = tmp_path / "trace.json"

    async def run() -> None:
        group = zspmd.launch(Busy, world_size=2, preload=(), trace=path)
        for _ in range(2):
            async with zspmd.WorkerGroup(group.config) as next_group:
                await next_group.step(0)

    asyncio.run(run())
    trace = read_trace(path)
    assert set(trace.rows) == {"driver", *RANKS, *(f"{rank}, launch 2" for rank in RANKS)}
    assert len(trace.spans("driver", "publish")) == len(trace.launches) == 2
    assert all(len(trace.spans(row, "step")) == 1 for row in trace.rows if row != "driver")
    check_events(json.loads(path.read_text())["traceEvents"])
