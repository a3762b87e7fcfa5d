"""Driver, guard and agent dying in every pair and at every moment of a start; nothing may be left, whoever goes first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.leaks import LeakCheck
from support.polling import block_until

# A rank with a double-forked child in a session of its own, under a driver that does what it is told.
DAEMON = """
import os, signal
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print('daemon', os.getpid(), flush=True)
        while True: signal.pause()
    os._exit(0)
os.wait()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True: signal.pause()
"""
DRIVER = """
import asyncio, json, os, signal, sys
from zspmd.runtime.launch import agent_process
from zspmd.runtime.launch import run_directory
from zspmd.runtime.launch import supervisor
from zspmd.runtime.launch.agent_protocol import RankLog, RankStart, Start
from zspmd.runtime.launch.run_directory import RunDirectory
from zspmd.runtime.launch.supervisor import NodeSupervisor

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

async def drive(program, moment):
    daemon = asyncio.get_running_loop().create_future()
    node = NodeSupervisor(lambda event: daemon.set_result(event.lines) if isinstance(event, RankLog) else None)
    node.open()
    if moment == "the agent is started":
        die()
    if moment == "the directory is made":
        run_directory._lock = die
    elif moment == "the lock file is made":
        run_directory._wait_locked = die
    elif moment == "the directory is locked":
        RunDirectory._clean = die
    directory = RunDirectory.create("driver")
    (directory.path / "socket").write_text("")
    if moment == "the directory is full":
        die()
    elif moment == "the directory is handed over":
        agent_process.AgentProcess.send = die
    order = Start((RankStart(0, dict(os.environ)),), "spawn", argv=(sys.executable, "-I", "-S", "-c", program))
    starting = asyncio.ensure_future(node.start(order, directory))
    await asyncio.sleep(0)
    if moment == "the order is sent":
        die()
    await starting
    if moment == "the rank is started":
        die()
    await daemon
    print(json.dumps({"driver": os.getpid(), "guard": node.guard_pid, "agent": node.agent_pid, "rank": node.pids[0]}), flush=True)
    await asyncio.sleep(600)

asyncio.run(drive(*sys.argv[1:]))
"""
MOMENTS = [
    "the agent is started",
    "the directory is made",
    "the lock file is made",
    "the directory is locked",
    "the directory is full",
    "the directory is handed over",
    "the order is sent",
    "the rank is started",
]


@contextmanager
def driver(moment: str = "") -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", DRIVER, DAEMON, moment], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def running(process: subprocess.Popen[str]) -> dict[str, int]:
    assert process.stdout is not None
    pids: dict[str, int] = json.loads(process.stdout.readline())
    return pids


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_driver_that_dies_while_it_starts_leaves_nothing(leak_check: LeakCheck, moment: str) -> None:
    with driver(moment) as process:
        assert process.wait(30) == -signal.SIGKILL
        leak_check.wait_gone()


@pytest.mark.parametrize(
    "victims",
    [("driver",), ("driver", "agent"), ("agent", "driver"), ("driver", "guard"), ("guard", "driver")],
    ids=lambda victims: " then ".join(victims),
)
def test_the_driver_dies_alone_or_with_another(leak_check: LeakCheck, victims: tuple[str, ...]) -> None:
    with driver() as process:
        pids = running(process)
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        process.wait(10)
        leak_check.wait_gone()


@pytest.mark.parametrize("victim", ["agent", "guard", "rank"])
def test_one_below_the_driver_dies(leak_check: LeakCheck, victim: str) -> None:
    with driver() as process:
        pids = running(process)
        os.kill(pids[victim], signal.SIGKILL)
        block_until(lambda: set(leak_check.processes()) == {process.pid}, 5.0)
        assert leak_check.run_directories() == []


@pytest.mark.parametrize("victims", [("driver",), ("driver", "agent"), ("driver", "guard")], ids=lambda victims: " and ".join(victims))
def test_a_stopped_rank_does_not_outlive_them(leak_check: LeakCheck, victims: tuple[str, ...]) -> None:
    with driver() as process:
        pids = running(process)
        os.kill(pids["rank"], signal.SIGSTOP)
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        process.wait(10)
        leak_check.wait_gone()


@pytest.mark.parametrize("stopped", ["agent", "guard"])
def test_one_that_is_stopped_does_not_outlive_the_driver(leak_check: LeakCheck, stopped: str) -> None:
    with driver() as process:
        os.kill(running(process)[stopped], signal.SIGSTOP)
        process.kill()
        process.wait(10)
        leak_check.wait_gone()


@pytest.mark.parametrize(("victim", "name"), [("guard", "SIGTERM"), ("agent", "SIGHUP"), ("guard", "SIGQUIT"), ("agent", "SIGQUIT")])
def test_a_signal_that_asks_for_the_end_ends_all_below_the_driver(leak_check: LeakCheck, victim: str, name: str) -> None:
    with driver() as process:
        pids = running(process)
        os.kill(pids[victim], signal.Signals[name])
        block_until(lambda: set(leak_check.processes()) == {process.pid}, 5.0)
        assert leak_check.run_directories() == []
