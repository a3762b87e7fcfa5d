"""A worker group against what breaks it: who is blamed, how soon, and that nothing is left.

Detection is to take 1 s; the limits here leave room for a machine that is busy with other things.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.groups import DEADLINES, launch
from support.leaks import LeakCheck
from support.polling import block_until, wait_until

import zspmd
from zspmd.errors import (
    EndpointInUseError,
    PeerLostError,
    ReadyTimeoutError,
    WorkerError,
    WorkerExitedError,
    WorkerRaisedError,
    WorkerStalledError,
)

pytestmark = pytest.mark.usefixtures("leak_check")
TESTS = Path(__file__).parents[1]
DETECTION_S = 1.0
END_S = 5.0
BACKENDS = pytest.mark.parametrize("communicator", ["shm", "gloo"])


@contextmanager
def within(limit_s: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < limit_s


@asynccontextmanager
async def stuck_ranks(tmp_path: Path, *, world_size: int, absent: int, communicator: str) -> AsyncIterator[tuple[Any, list[int]]]:
    """Yield a pending step whose ranks are stuck in a collective since ``absent`` does not enter it, and the ranks' pids."""
    arguments = {"directory": str(tmp_path), "absent": [absent]}
    async with launch("Stuck", world_size, worker_args=arguments, communicator=communicator, preload=("torch",)) as group:
        pending = await group.submit(None)
        files = [tmp_path / f"rank{rank}" for rank in range(world_size)]
        await wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        yield pending, [int(file.read_text()) for file in files]


@BACKENDS
async def test_a_rank_that_is_killed_is_blamed_while_its_peers_are_stuck(tmp_path: Path, communicator: str) -> None:
    async with stuck_ranks(tmp_path, world_size=3, absent=1, communicator=communicator) as (pending, pids):
        os.kill(pids[1], signal.SIGKILL)
        with within(DETECTION_S), pytest.raises(WorkerExitedError) as caught:
            await pending
    error = caught.value
    assert (error.rank, error.exit_code, error.pid) == (1, -signal.SIGKILL, pids[1])
    assert "was ended by SIGKILL" in str(error)
    assert not [line for line in error.consequences if not line.startswith(("rank 0: ", "rank 2: "))]


@BACKENDS
async def test_a_rank_that_is_killed_inside_the_collective_is_blamed(tmp_path: Path, communicator: str) -> None:
    async with stuck_ranks(tmp_path, world_size=3, absent=1, communicator=communicator) as (pending, pids):
        os.kill(pids[2], signal.SIGSEGV)
        with within(DETECTION_S), pytest.raises(WorkerExitedError) as caught:
            await pending
    assert (caught.value.rank, caught.value.exit_code) == (2, -signal.SIGSEGV)


@BACKENDS
async def test_a_rank_that_raises_is_blamed_and_its_peers_are_consequences(communicator: str) -> None:
    async with launch("Troubled", 3, communicator=communicator, preload=("torch",)) as group:
        await group.step({"reduce": True})
        with within(DETECTION_S), pytest.raises(WorkerRaisedError, match="in its step: a step goes wrong here") as caught:
            await group.step({2: "raise", "reduce": True})
        error = caught.value
        assert (error.rank, error.step_id, error.exception_type) == (2, 1, "builtins.RuntimeError")
        assert 'raise RuntimeError("a step goes wrong here")' in error.remote_traceback
        assert not [line for line in error.consequences if not line.startswith(("rank 0: ", "rank 1: "))]
        for use in (group.step(1), group.submit(1), group.call("info")):
            with pytest.raises(WorkerRaisedError) as again:
                await use
            assert again.value is error


@pytest.mark.parametrize(("action", "exit_code"), [("exit", 7), ("kill", -signal.SIGKILL)], ids=["exits", "is killed"])
async def test_a_rank_that_ends_in_a_step_is_blamed_with_its_last_words(action: str, exit_code: int) -> None:
    async with launch("Troubled", on_log=lambda *_: None) as group:
        with within(DETECTION_S), pytest.raises(WorkerExitedError) as caught:
            await group.step({1: action})
    error = caught.value
    assert (error.rank, error.exit_code) == (1, exit_code)
    assert error.log_tail == (("rank 1 sets up", "about to leave") if action == "exit" else ("rank 1 sets up",))
    assert error.log_tail[-1] in str(error)


async def test_every_await_gets_the_first_cause() -> None:
    async with launch("Troubled", window=2) as group:
        steps = [asyncio.ensure_future(group.step({0: "kill"})) for _ in range(5)]  # two in flight, three wait for room
        with within(DETECTION_S):
            results = await asyncio.gather(*steps, return_exceptions=True)
        assert {type(result) for result in results} == {WorkerExitedError}
        assert len({id(result) for result in results}) == 1


async def test_a_fault_that_nobody_awaits_is_raised_at_the_end() -> None:
    group = launch("Echo")
    await group.start()
    pid = group.health()[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: group.fault is not None, DETECTION_S)
    with pytest.raises(WorkerExitedError) as caught:
        await group.aclose()
    assert (caught.value.rank, caught.value.exit_code) == (1, -signal.SIGKILL)


async def test_a_fault_that_was_told_is_not_raised_again() -> None:
    async with launch("Troubled") as group:
        with pytest.raises(WorkerExitedError):
            await group.step({1: "exit"})


async def test_a_step_submitted_and_forgotten_still_tells_its_fault_at_the_end() -> None:
    with pytest.raises(WorkerExitedError) as caught:
        async with launch("Troubled") as group:
            await group.submit({1: "exit"})
    assert caught.value.rank == 1


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"raise_on": 1}, WorkerRaisedError, "raised builtins.RuntimeError in its setup: set-up goes wrong here"),
        ({"exit_on": 1}, WorkerExitedError, "exited with code 7"),
        ({"absent": 1}, WorkerRaisedError, "unexpected keyword argument 'absent'"),
    ],
    ids=["raises", "exits", "wrong arguments"],
)
async def test_a_set_up_that_fails_is_blamed(arguments: dict[str, Any], kind: type[WorkerError], words: str) -> None:
    group = launch("Troubled", worker_args=arguments)
    with pytest.raises(kind, match=words) as caught:
        await group.start()
    if "absent" not in arguments:
        assert caught.value.rank == 1
    assert caught.value.step_id is None
    await group.aclose()


async def test_a_set_up_that_stalls_names_the_ranks_that_are_missing() -> None:
    group = launch("Troubled", 3, worker_args={"stall_on": 1}, deadlines=zspmd.Deadlines(ready_s=3.0))
    words = r"not ready within 3 s: .*rank 1 \(pid \d+\) is in its setup"
    with within(3.0 + END_S), pytest.raises(ReadyTimeoutError, match=words) as caught:
        await group.start()
    assert 1 in caught.value.missing


async def test_a_class_that_is_not_there_is_named() -> None:
    with pytest.raises(WorkerRaisedError, match=r"cannot import the worker 'support\.workers:Absent'"):
        await launch("Absent").start()


async def test_an_agent_that_is_killed_takes_the_group_with_it(leak_check: LeakCheck) -> None:
    async with launch("Gate") as group:
        pending = await group.submit({"path": "/nonexistent", "ranks": [0, 1]})
        (agent,) = (pid for pid, command in leak_check.processes().items() if os.getpid() == parent_of(pid))
        os.kill(agent, signal.SIGKILL)
        with within(DETECTION_S), pytest.raises(PeerLostError, match=r"the agent that supervises the ranks is gone: .*SIGKILL"):
            await pending


async def test_a_rank_that_ignores_stop_is_ended_and_blamed(tmp_path: Path) -> None:
    deadlines = replace(DEADLINES, drain_s=0.3, kill_s=0.3)
    group = launch("Gate", deadlines=deadlines)
    await group.start()
    with pytest.raises(WorkerStalledError):
        await group.step({"path": str(tmp_path / "never"), "ranks": [1]}, timeout_s=0.1)
    with within(END_S), pytest.raises(WorkerStalledError, match=r"did not end within 0\.3 s of STOP") as caught:
        await group.aclose()
    assert caught.value.rank == 1


async def test_a_launch_id_can_be_used_once_at_a_time() -> None:
    async with launch("Echo", launch_id="held") as first:
        second = launch("Echo", launch_id="held")
        with within(DETECTION_S), pytest.raises(EndpointInUseError, match=f"launch id 'held' is held by pid {os.getpid()}; end"):
            await second.start()
        assert len(await first.step("unharmed")) == 2
    async with launch("Echo", launch_id="held") as third:
        assert len(await third.step("free again")) == 2


@pytest.mark.parametrize("num_processes", [0, 1, 3], ids=["at once", "with the agent", "with a rank"])
async def test_cancelling_a_start_leaves_nothing(leak_check: LeakCheck, num_processes: int) -> None:
    group = launch("Troubled", worker_args={"stall_on": 0})
    starting = asyncio.ensure_future(group.start())
    await asyncio.wait([starting], timeout=0)
    await wait_until(lambda: len(leak_check.processes()) >= num_processes)
    with within(END_S):
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert leak_check.processes() == {}
    assert leak_check.run_directories() == []


DRIVER = """
import asyncio, sys
sys.path.insert(0, {tests!r})
from support.groups import launch

async def main():
    async with launch("Gate") as group:
        pending = await group.submit({{"path": "/nonexistent", "ranks": [0, 1]}})
        print("ready", flush=True)
        await pending

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@contextmanager
def driver_script(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield a driver process of two ranks that are inside a step; in a session of its own, as in a terminal."""
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER.format(tests=str(TESTS))))
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        yield driver


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_the_death_of_the_driver_ends_everything(leak_check: LeakCheck, tmp_path: Path) -> None:
    with driver_script(tmp_path) as driver:
        assert len(leak_check.processes()) >= 4  # driver, agent, ranks
        assert len(leak_check.run_directories()) == 1
        driver.kill()
        with within(END_S):
            driver.wait()
            leak_check.wait_gone(END_S)


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["the driver alone", "the whole terminal"])
async def test_ctrl_c_ends_everything(leak_check: LeakCheck, tmp_path: Path, send: Callable[[int, int], None]) -> None:
    with driver_script(tmp_path) as driver:
        with within(END_S):
            send(driver.pid, signal.SIGINT)
            assert driver.stdout is not None
            assert (driver.stdout.read(), driver.wait()) == ("interrupted\n", 130)
        assert leak_check.processes() == {}


async def test_a_stopped_rank_is_named_by_its_timeout_and_ended(leak_check: LeakCheck) -> None:
    group = launch("Echo")
    await group.start()
    pid = group.health()[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(WorkerStalledError) as caught:
        await group.step(1, timeout_s=0.3)
    assert (caught.value.rank, caught.value.missing) == (1, (1,))
    with within(2 * END_S):
        await group.aclose(abort=True)
    block_until(lambda: leak_check.processes() == {})


async def test_a_rank_that_fails_while_others_are_being_started_is_the_cause() -> None:
    with pytest.raises(WorkerRaisedError, match="set-up goes wrong here") as caught:
        await launch("Troubled", 12, worker_args={"raise_on": 0}).start()
    assert caught.value.rank == 0


async def test_a_start_that_takes_too_long_says_so_whatever_it_was_doing() -> None:
    with pytest.raises(ReadyTimeoutError, match=r"not ready within 0\.05 s"):
        await launch("Echo", 2, deadlines=replace(DEADLINES, ready_s=0.05)).start()


async def test_a_fault_is_raised_at_the_end_when_its_only_witness_had_given_up() -> None:
    group = launch("Troubled", window=1)
    await group.start()
    await group.submit({0: "sleep"})
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(group.submit({}), 0.05)
    pid = group.health()[1].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await wait_until(lambda: group.fault is not None, DETECTION_S)
    with pytest.raises(WorkerExitedError) as caught:
        await group.aclose()
    assert caught.value.rank == 1
