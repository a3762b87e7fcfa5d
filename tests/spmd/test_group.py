"""A worker group with real ranks: steps, calls, timeouts, cancellation, back-pressure, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from support.groups import DEADLINES, launch
from support.leaks import LeakCheck
from support.polling import wait_until

import zspmd
from zspmd.errors import (
    BackpressureError,
    ClosedError,
    ConfigError,
    TopologyError,
    WorkerExitedError,
    WorkerRaisedError,
    WorkerStalledError,
)

pytestmark = pytest.mark.usefixtures("leak_check")


async def test_steps_reach_every_rank_in_order() -> None:
    async with launch("Echo", 3, worker_args={"scale": 3.0}) as group:
        for number in range(20):
            answers = await group.step({"n": number})
            assert answers == [{"rank": rank, "inputs": {"n": number}} for rank in range(3)]
        infos = await group.call("info")
        assert [(info["rank"], info["num_steps"], info["scale"]) for info in infos] == [(rank, 20, 3.0) for rank in range(3)]
        assert len({info["pid"] for info in infos}) == 3


@pytest.mark.parametrize("output_ranks", [(0,), (2, 0), (1,)], ids=str)
async def test_the_output_ranks_answer_in_their_order(output_ranks: tuple[int, ...]) -> None:
    async with launch("Echo", 3, output_ranks=output_ranks) as group:
        assert [answer["rank"] for answer in await group.step(None)] == list(output_ranks)


async def test_a_step_waits_for_the_ranks_that_it_names_and_for_no_other(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with launch("Gate", 3, output_ranks=(0, 2), window=8) as group:
        slow = await group.submit({"ranks": [2], "path": str(gate)}, ranks=[2])
        others = [await group.submit({"ranks": [], "path": ""}, ranks=(0,)) for _ in range(3)]
        assert [await other for other in others] == [[0]] * 3
        assert not slow.is_done
        gate.touch()
        assert await slow == [2]
        with pytest.raises(TopologyError, match=r"ranks has 1, which does not answer steps; the output ranks are \(0, 2\)"):
            await group.submit({"ranks": [], "path": ""}, ranks=[0, 1])
        for none_or_twice in ([], [0, 0], [3]):  # nobody would ever have answered
            with pytest.raises(TopologyError, match="it must name one or more different ranks from 0 to 2"):
                await group.submit({"ranks": [], "path": ""}, ranks=none_or_twice)
        await wait_until(lambda: not group.statistics().in_flight)
        assert group.statistics().late_answers == 0


async def test_calls_take_arguments_and_ranks() -> None:
    async with launch("Echo", 3) as group:
        assert await group.call("add", 1, b=2) == [3, 3, 3]
        assert await group.call("add", 1, ranks=[1]) == [1]
        assert [info["rank"] for info in await group.call("info", ranks=(2, 0))] == [2, 0]
        with pytest.raises(TopologyError, match=r"ranks is \[3\]; it must name one or more different ranks from 0 to 2"):
            await group.call("info", ranks=[3])
        with pytest.raises(TypeError, match="method is 5; give the name"):
            await group.call(5)  # type: ignore[arg-type]  # the very mistake
        assert await group.step("still here") != []


async def test_calls_are_ordered_with_steps() -> None:
    async with launch("Echo", window=8) as group:
        pending = [await group.submit(number) for number in range(5)]
        infos = await group.call("info")
        assert [info["num_steps"] for info in infos] == [5, 5]
        assert [(await reply)[0]["inputs"] for reply in pending] == list(range(5))
        assert [reply.step_id for reply in pending] == list(range(5))


async def test_many_steps_in_flight_are_answered_to_their_askers() -> None:
    async with launch("Echo", window=4) as group:

        async def ask(number: int) -> None:
            assert [answer["inputs"] for answer in await group.step([number])] == [[number]] * 2

        await asyncio.gather(*(ask(number) for number in range(100)))
        assert (group.statistics().steps, group.statistics().in_flight) == (100, 0)


async def test_a_call_that_raises_leaves_the_group_alive() -> None:
    async with launch("Gate", 3) as group:
        with pytest.raises(WorkerRaisedError, match="rank 1 fails") as caught:
            await group.call("fail_on", [1])
        error = caught.value
        assert (error.rank, error.exception_type, error.step_id, error.consequences) == (1, "builtins.LookupError", None, ())
        assert "in fail_on" in error.remote_traceback
        assert error.pid == group.health()[1].pid
        assert await group.call("fail_on", []) == [0, 1, 2]
        with pytest.raises(WorkerRaisedError, match=r"Gate has no method 'nothing' marked @zspmd\.rpc; marked are: fail_on, wait"):
            await group.call("nothing")


async def test_what_may_not_travel_is_named_and_nothing_is_sent() -> None:
    async with launch("Echo") as group:
        with pytest.raises(TypeError, match=r"value\['x'\]\[1\] is a builtins.tuple"):
            await group.step({"x": [1, (2,)]})
        with pytest.raises(TypeError, match=r"value\[1\]\[0\] is a builtins.object"):
            await group.call("add", object())
        with pytest.raises(ConfigError, match="timeout_s is 0; it must be a number of seconds above 0"):
            await group.step(1, timeout_s=0)
        pending = await group.submit(1)
        assert (pending.step_id, group.statistics().steps) == (0, 1)
        await pending


async def test_closing_a_group_that_never_started_ends_its_events_and_it_cannot_be_started() -> None:
    group = launch("Echo")
    for _ in range(2):
        await group.aclose()
    assert [event.kind async for event in group.events()] == ["closed"]
    with pytest.raises(ClosedError, match="was started or closed before"):
        await group.start()


async def test_a_start_that_fails_ends_its_events() -> None:
    group = launch("Echo", worker_args={"scale": {1.0}})
    with pytest.raises(TypeError):
        await group.start()
    assert [event.kind async for event in group.events()] == ["closing", "closed"]


async def test_arguments_of_the_worker_that_may_not_travel_start_nothing(leak_check: LeakCheck) -> None:
    group = launch("Echo", worker_args={"scale": {1.0}})
    with pytest.raises(TypeError, match=r"value\['scale'\] is a builtins.set"):
        await group.start()
    assert leak_check.run_directories() == []
    with pytest.raises(ClosedError, match="has not been started, or could not be"):
        group.health()
    with pytest.raises(ClosedError, match="was started or closed before; launch a new one"):
        await group.start()


async def test_a_step_that_times_out_names_who_has_not_answered_and_the_group_lives_on(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with launch("Gate", 3) as group:
        with pytest.raises(WorkerStalledError, match=r"no answer to step 0 within 0\.\d+ s; not done with it: rank 1 ") as caught:
            await group.step({"path": str(gate), "ranks": [1]}, timeout_s=0.3)
        assert (caught.value.rank, caught.value.missing) == (1, (1,))
        assert caught.value.pid == group.health()[1].pid
        gate.touch()
        assert await group.step({"path": str(gate), "ranks": [1]}) == [0, 1, 2]
        assert group.statistics().late_answers == 1


async def test_a_late_answer_is_not_taken_for_another(tmp_path: Path) -> None:
    gates = [tmp_path / name for name in "abc"]
    async with launch("Gate", 1, window=4) as group:
        with pytest.raises(WorkerStalledError, match="no answer to the call within"):
            await group.call("wait", str(gates[0]), [0], timeout_s=0.1)
        later = asyncio.ensure_future(group.call("fail_on", []))
        for gate in gates:
            gate.touch()
        assert await later == [0]
        assert group.statistics().late_answers == 1


async def test_cancelling_an_await_loses_nothing(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with launch("Gate") as group:
        pending = await group.submit({"path": str(gate), "ranks": [0, 1]})
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(pending, 0.05)
        step = asyncio.ensure_future(group.step({"path": str(gate), "ranks": []}))
        await wait_until(lambda: group.statistics().in_flight == 2)
        step.cancel()
        gate.touch()
        assert await pending == [0, 1]
        with pytest.raises(asyncio.CancelledError):
            await step
        assert await group.step({"path": str(gate), "ranks": []}) == [0, 1]
        assert group.statistics().steps == 3


async def test_back_pressure_when_a_rank_stalls(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    closed, opened = {"path": str(gate), "ranks": [1]}, {"path": str(gate), "ranks": []}
    async with launch("Gate", window=2, deadlines=replace(DEADLINES, step_s=0.5)) as group:
        pending = [await group.submit(closed, timeout_s=30.0), await group.submit(opened, timeout_s=30.0)]
        with pytest.raises(BackpressureError, match=r"no room in the window of 2 frames within 0\.5 s: rank 1 has not done the oldest"):
            await group.submit(opened)
        waiting = [asyncio.ensure_future(group.submit(opened, timeout_s=30.0)) for _ in range(4)]
        await asyncio.wait(waiting, timeout=0.05)
        assert not any(task.done() for task in waiting)
        assert group.statistics().steps == 2
        waiting[0].cancel()
        gate.touch()
        for reply in [*pending, *(await asyncio.gather(*waiting[1:]))]:
            assert await reply == [0, 1]
        assert (group.statistics().steps, group.statistics().in_flight) == (5, 0)


async def test_an_asker_that_gives_up_on_its_turn_passes_the_room_on(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    inputs = {"path": str(gate), "ranks": [0]}
    async with launch("Gate", 1, window=1) as group:
        first = await group.submit(inputs)
        second, third = (asyncio.ensure_future(group.submit(inputs)) for _ in range(2))
        await asyncio.wait([second, third], timeout=0.01)
        gate.touch()
        await first.wait_done()
        second.cancel()  # it has been granted room by now, and has not run yet or just published
        assert await (await asyncio.wait_for(third, 10.0)) == [0]


async def test_events_tell_a_launch_from_its_start_to_its_end() -> None:
    group = launch("Gate", 2)
    early = group.events()
    async with group:
        with pytest.raises(WorkerStalledError):
            await group.step({"path": "/nobody makes this", "ranks": [1]}, timeout_s=0.2)
        os.kill(group.health()[1].pid or 0, signal.SIGKILL)
        with pytest.raises(WorkerExitedError):
            await group.step(None)
    for stream in (early, group.events()):
        events = [event async for event in stream]
        kinds = [event.kind for event in events]
        assert (events[0].kind, events[0].rank) == ("serving", None)
        assert sorted((event.kind, event.rank) for event in events[1:5]) == [(k, r) for k in ("connected", "started") for r in (0, 1)]
        assert [kind for kind in kinds if kind in ("ready", "stalled", "failed", "closing", "closed")] == [
            "ready",
            "stalled",
            "failed",
            "closing",
            "closed",
        ]
        assert [(event.rank, "SIGKILL" in event.detail) for event in events if event.kind == "failed"] == [(1, True)]
        assert {event.rank for event in events if event.kind == "exited"} == {0, 1}
        assert [event.at for event in events] == sorted(event.at for event in events)


async def test_closing_waits_for_what_is_in_flight() -> None:
    async with launch("Echo", window=16) as group:
        pending = [await group.submit(number) for number in range(16)]
    assert [(await reply)[1]["inputs"] for reply in pending] == list(range(16))


async def test_a_closed_group_says_so(leak_check: LeakCheck) -> None:
    group = launch("Echo")
    with pytest.raises(ClosedError, match="has not been started"):
        await group.step(1)
    with pytest.raises(ClosedError, match="has not been started"):
        group.statistics()
    async with group:
        await group.step(1)
    for use in (group.step(1), group.submit(1), group.call("info"), group.start()):
        with pytest.raises(ClosedError, match=f"group {group.launch_id} .*; launch a new one"):
            await use
    await group.aclose()
    assert group.statistics().steps == 1
    assert [health.rank for health in group.health()] == [0, 1]
    assert leak_check.processes() == {}


async def test_several_closings_at_once_are_one() -> None:
    group = launch("Echo")
    await group.start()
    cancelled = asyncio.ensure_future(group.aclose())
    await asyncio.wait([cancelled], timeout=0)
    cancelled.cancel()
    await asyncio.gather(group.aclose(), group.aclose(abort=True), return_exceptions=False)
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    with pytest.raises(ClosedError):
        await group.step(1)


@pytest.mark.parametrize("num_ranks", [0, 2], ids=["before there are ranks", "in their set-up"])
async def test_closing_while_another_task_starts_it_ends_the_start(num_ranks: int) -> None:
    lines: list[str] = []
    group = launch("Troubled", worker_args={"stall_on": 0}, on_log=lambda rank, stream, line: lines.append(line))
    starting = asyncio.ensure_future(group.start())
    await asyncio.wait([starting], timeout=0)
    await wait_until(lambda: len(lines) == num_ranks, 30.0)
    with pytest.raises(ClosedError, match="is not ready"):
        await group.step(1)
    await group.aclose()
    with pytest.raises((ClosedError, zspmd.LaunchError)):
        await asyncio.wait_for(starting, 10.0)


async def test_an_error_in_the_body_ends_the_ranks_at_once(leak_check: LeakCheck) -> None:
    async def fail_inside() -> None:
        async with launch("Gate") as group:
            await group.submit({"path": "/nonexistent", "ranks": [0, 1]})
            raise KeyError("body")

    with pytest.raises(KeyError, match="body"):
        await fail_inside()
    assert leak_check.processes() == {}


async def test_health_says_what_each_rank_is_doing(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with launch("Gate") as group:
        pids = [health.pid for health in group.health()]
        pending = await group.submit({"path": str(gate), "ranks": [1]})
        await wait_until(lambda: [(health.phase, health.step_id) for health in group.health()] == [("idle", 0), ("step", 0)])
        assert [health.done_step_id for health in group.health()] == [0, -1]
        for rank, health in enumerate(group.health()):
            assert (health.rank, health.pid, health.host, health.step_id) == (rank, pids[rank], os.uname().nodename, 0)
            assert health.beat_age_s is not None
            assert 0 <= health.beat_age_s < 5.0
            assert health.memory_bytes > 1 << 20
        gate.touch()
        await pending


async def test_statistics_count_what_was_done() -> None:
    async with launch("Echo") as group:
        await group.step(b"x" * 1000)
        await group.call("info")
        statistics = group.statistics()
        assert (statistics.steps, statistics.calls, statistics.in_flight, statistics.late_answers) == (1, 1, 0, 0)
        assert 1000 < statistics.sent_bytes < 1200
        parts = (statistics.publish, statistics.transit, statistics.compute, statistics.collect)
        assert [part.count for part in parts] == [statistics.round_trip.count] * 4 == [2] * 4
        assert all(part.total_ns > 0 for part in parts)
        assert sum(part.total_ns for part in parts) == statistics.round_trip.total_ns
