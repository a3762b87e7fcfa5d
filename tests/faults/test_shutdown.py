"""Closing is bounded whatever the ranks do, may be asked for by anybody at any time, and tells exactly when a rank failed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.groups import DEADLINES, launch
from support.latencies import Latencies
from support.leaks import LeakCheck
from support.polling import block_until
from support.script_runs import RUN

import zspmd
from zspmd.errors import ClosedError, PeerLostError, WorkerExitedError, WorkerStalledError, ZspmdError

BUDGETS = replace(DEADLINES, drain_s=0.4, kill_s=0.4)
GRACEFUL_S = 2 * BUDGETS.drain_s + 2 * BUDGETS.kill_s
MARGIN_S = 2.0  # for a machine that is busy with other things
WAYS = ["stays in its step", "stays in its teardown", "ignores signals", "is stopped", "has daemons", "has a hydra"]


def clinging_group(how: str, world_size: int = 2) -> zspmd.WorkerGroup:
    options: dict[str, Any] = {"world_size": world_size, "output_ranks": "all", "preload": (), "deadlines": BUDGETS}
    return zspmd.launch("support.clinging:Clinging", worker_args={"how": how}, on_log=lambda *_: None, **options)


@pytest.mark.parametrize("how", WAYS)
async def test_closing_takes_no_longer_than_its_budgets(leak_check: LeakCheck, how: str) -> None:
    group = clinging_group(how)
    await group.start()
    pending = await group.submit("stay")
    began = time.monotonic()
    (error,) = await asyncio.gather(group.aclose(), return_exceptions=True)
    elapsed_s = time.monotonic() - began
    assert leak_check.processes() == {}
    if how.startswith("has"):  # its children are no failure of its own
        assert error is None
        assert await pending == ["stay"] * 2
        return
    assert BUDGETS.drain_s <= elapsed_s < GRACEFUL_S + MARGIN_S
    assert isinstance(error, WorkerStalledError)
    assert error.rank == 1
    if how == "stays in its step":
        with pytest.raises(ClosedError):
            await pending


@pytest.mark.parametrize("how", ["stays in its step", "is stopped", "has a hydra"])
async def test_aborting_waits_for_nobody(leak_check: LeakCheck, how: str) -> None:
    group = clinging_group(how)
    await group.start()
    pending = await group.submit("stay")
    if how == "is stopped":
        pid = group.health()[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    await group.aclose(abort=True)
    assert time.monotonic() - began < 2 * BUDGETS.kill_s + MARGIN_S
    assert leak_check.processes() == {}
    (outcome,) = await asyncio.gather(pending, return_exceptions=True)
    assert isinstance(outcome, ClosedError) or outcome == ["stay"] * 2


@pytest.mark.parametrize("count", [pytest.param(6, id="quick"), pytest.param(150, id="long", marks=pytest.mark.long)])
async def test_a_hundred_closings_at_once_are_one(leak_check: LeakCheck, request: pytest.FixtureRequest, count: int) -> None:
    """In any state: being started, ready, with steps on their way, failing. Every await ends once, and all closings alike."""
    latencies = Latencies("from the first of 100 closings to the last one's end", GRACEFUL_S + MARGIN_S)
    for seed in range(count):
        chance = random.Random(seed)
        state = ("starting", "ready", "busy", "failing")[seed % 4]
        group = launch("Echo", chance.randint(1, 3), deadlines=BUDGETS)
        starting = asyncio.ensure_future(group.start())
        if state == "starting":
            await asyncio.sleep(chance.random() * 0.5)
        else:
            await starting
        asks = [asyncio.ensure_future(group.step(number)) for number in range(20 if state == "busy" else 0)]
        if state == "failing":
            pid = group.health()[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(chance.random() * 0.08)
        began = time.monotonic()
        aborts = [chance.random() < share for share in (0.3, *[0.1] * 99)]
        closings = await asyncio.gather(*(group.aclose(abort=abort) for abort in aborts), return_exceptions=True)
        latencies.add(time.monotonic() - began, f"seed {seed}: {state}")
        (again,) = await asyncio.gather(group.aclose(), return_exceptions=True)
        assert {repr(error) for error in closings} == {repr(again)}, (seed, state, closings)
        is_raised = state == "failing" and not aborts[0]  # the first closing decides for all
        assert isinstance(again, WorkerExitedError) if is_raised else again is None, (seed, state, again)
        for outcome in await asyncio.gather(starting, *asks, return_exceptions=True):
            assert outcome is None or isinstance(outcome, (list, ZspmdError)), (seed, state, outcome)
        leak_check.wait_gone()
    latencies.publish(request)


async def test_steps_on_their_way_are_waited_for(leak_check: LeakCheck) -> None:
    group = launch("Echo", window=4)
    await group.start()
    pending = [await group.submit(number) for number in range(4)]
    await group.aclose()
    assert [(await reply)[0]["inputs"] for reply in pending] == [0, 1, 2, 3]


# --- exit codes ---

SCRIPT = """
import atexit, os, signal, sys, time
rank, how = int(os.environ["RANK"]), sys.argv[1]
if rank == 1:
    if how == "killed on its way out":
        atexit.register(os.kill, os.getpid(), signal.SIGKILL)
    elif how == "exit code on its way out":
        atexit.register(os._exit, 9)
    elif how == "raises on its way out":
        atexit.register(lambda: 1 / 0)
    elif how == "late":
        time.sleep(0.5)
"""


@pytest.mark.parametrize(
    ("how", "code"),
    [("late", 0), ("killed on its way out", 137), ("exit code on its way out", 9), ("raises on its way out", 0)],
)
def test_the_exit_code_of_a_script_tells_whether_a_rank_failed_at_its_end(
    leak_check: LeakCheck, tmp_path: Path, how: str, code: int
) -> None:
    """An exception in ``atexit`` is none of Python's exit codes, and so none of ours."""
    (tmp_path / "ends.py").write_text(SCRIPT)
    done = subprocess.run([*RUN, "-n", "2", str(tmp_path / "ends.py"), how], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, done.stderr
    assert ("first cause  rank 1 on" in done.stderr) == (code != 0)


@pytest.mark.parametrize("count", [pytest.param(1, id="quick"), pytest.param(40, id="long", marks=pytest.mark.long)])
def test_a_rank_that_is_killed_as_generate_ends_is_a_failure_or_was_done(leak_check: LeakCheck, count: int) -> None:
    """The kill comes as the last text is out: whichever is first, exit code and message say the same."""
    for seed in range(count):
        command = [*RUN, "--tp", "2", "generate", "--max-restarts", "0", "1+1="]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            block_until(lambda: len(rank_pids(process.pid)) == 2 or process.poll() is not None, 60.0)
            pid = rank_pids(process.pid)[-1]
            assert process.stdout.readline() == "1+1=2\n"
            time.sleep(random.Random(seed).random() * 0.05)  # the moment of the kill
            kill_if_there(pid)
            _, told = process.communicate(timeout=30)
        assert (process.returncode, "was ended by SIGKILL" in told) in ((0, False), (137, True)), (seed, told)


def kill_if_there(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def rank_pids(driver_pid: int) -> list[int]:
    """Return the ranks of a driver, in their order."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, ancestor = (entry / "comm").read_text().strip(), int(entry.name)
                while name.startswith("zspmd-rank") and ancestor > 1:
                    ancestor = int(Path(f"/proc/{ancestor}/stat").read_text().rpartition(")")[2].split()[1])
                    if ancestor == driver_pid:
                        found[name] = int(entry.name)
            except OSError:  # it ended meanwhile
                continue
    return [found[name] for name in sorted(found)]


# --- Ctrl-C ---


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.long), 2, 3])
def test_ctrl_c_ends_generate_although_a_rank_is_stopped(leak_check: LeakCheck, count: int) -> None:
    endless = ["generate", "--ignore-eos", "--max-tokens", "500", *["zspmd is"] * 8]
    with subprocess.Popen([*RUN, "--tp", "2", *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == "z"
        os.kill(rank_pids(process.pid)[1], signal.SIGSTOP)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert any("SIGINT: ending" in line for line in process.stderr)
        for _ in range(count - 1):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)  # signals of one number that come at once are one
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < {1: 20.0, 2: 6.0, 3: 4.0}[count]
    assert leak_check.processes() == {}


EMBEDDED = """
import asyncio, os, signal, sys
sys.path.insert(0, {tests!r})
from support.groups import launch

async def main():
    async with launch("Echo") as group:
        os.kill(group.health()[1].pid, signal.SIGSTOP)
        print("ready", flush=True)
        await group.step(1)

asyncio.run(main())
"""


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ctrl_c_ends_an_embedded_driver_although_a_rank_is_stopped(leak_check: LeakCheck, count: int) -> None:
    """``asyncio.run`` cancels at the first and raises KeyboardInterrupt wherever it is at the second; nothing is left either way."""
    source = EMBEDDED.format(tests=str(Path(__file__).parents[1]))
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(count):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)  # likewise
        _, told = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in told
    leak_check.wait_gone()


AFTERWARDS = """
import asyncio, os, signal, sys, time
sys.path.insert(0, {tests!r})
from dataclasses import replace
from support.groups import DEADLINES
import zspmd

async def main():
    group = zspmd.launch("support.clinging:Clinging", world_size=2, preload=(), worker_args={{"how": "stays in its teardown"}},
                         deadlines=replace(DEADLINES, drain_s=20.0))
    await group.start()
    asyncio.get_running_loop().call_later(0.2, os.kill, os.getpid(), signal.SIGINT)
    asyncio.get_running_loop().call_later(0.4, os.kill, os.getpid(), signal.SIGINT)
    await group.aclose()

try:
    asyncio.run(main())
except KeyboardInterrupt:
    print("goes on", flush=True)
    sys.stdin.readline()
"""


def test_a_program_that_goes_on_after_ctrl_c_while_it_closes_has_no_ranks_left(leak_check: LeakCheck) -> None:
    """``asyncio.run`` cancels every task, the one that closes too: whoever wants it that quick gets it."""
    source = AFTERWARDS.format(tests=str(Path(__file__).parents[1]))
    with subprocess.Popen([sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "goes on\n"
        block_until(lambda: rank_pids(process.pid) == [], 5.0)
        process.communicate("\n", timeout=30)
    assert process.returncode == 0


def agent_of(group: zspmd.WorkerGroup) -> int:
    return int(Path(f"/proc/{group.health()[0].pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_an_agent_that_is_killed_during_the_teardown_is_told(leak_check: LeakCheck) -> None:
    group = clinging_group("stays in its teardown")
    await group.start()
    agent_pid = agent_of(group)
    closing = asyncio.ensure_future(group.aclose())
    await asyncio.sleep(0)
    os.kill(agent_pid, signal.SIGKILL)
    with pytest.raises(PeerLostError, match="was ended by SIGKILL"):
        await closing


async def test_who_asks_for_stacks_waits_no_longer_than_there_is_an_agent(leak_check: LeakCheck) -> None:
    group = launch("Echo", 1)
    await group.start()
    agent_pid = agent_of(group)
    os.kill(agent_pid, signal.SIGSTOP)
    asked = asyncio.ensure_future(group.dump_stacks(timeout_s=60.0))
    await asyncio.sleep(0)
    os.kill(agent_pid, signal.SIGKILL)
    assert await asyncio.wait_for(asked, 10.0) == {0: "its agent is gone"}
    await group.aclose(abort=True)
    with pytest.raises(ClosedError):
        await group.dump_stacks()


async def test_closing_from_another_thread_ends_the_group_where_it_lives(leak_check: LeakCheck) -> None:
    group = clinging_group("stays in its step")
    await group.start()
    step = asyncio.ensure_future(group.step("stay"))
    with ThreadPoolExecutor(1) as pool, pytest.raises(ClosedError, match="another event loop"):
        await asyncio.get_running_loop().run_in_executor(pool, asyncio.run, group.aclose())
    with pytest.raises(ClosedError, match="another event loop"):
        await step
    await group.aclose()
