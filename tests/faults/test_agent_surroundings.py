"""Ranks in the hands of a debugger or of another user, and agents that must find their modules elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from support.nodes import WAIT, Nodes
from support.nodes import nodes as nodes
from support.nodes import runtime_dir as runtime_dir
from support.polling import wait_until

from zspmd.runtime.launch.agent_protocol import RankExited
from zspmd.runtime.launch.rank_process import RankProcess

TRACER = """
import ctypes, sys, time
ptrace = ctypes.CDLL(None).ptrace
ptrace.argtypes = [ctypes.c_long] * 4
print(ptrace(0x4206, int(sys.argv[1]), 0, 0), flush=True)  # PTRACE_SEIZE
sys.stdin.read()
"""


def started(*command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def environment(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/environ") as file:
        return dict(entry.split("=", 1) for entry in file.read().split("\0") if entry)


async def test_a_rank_that_ends_in_the_hands_of_a_debugger_holds_up_no_other(nodes: Nodes) -> None:
    """Its end cannot be read until the debugger has seen it, and one that waits for its user has not."""
    node = await nodes.started(WAIT, 2)
    with started(sys.executable, "-I", "-S", "-c", TRACER, str(node.supervisor.pids[0])) as tracer:
        assert tracer.stdout is not None
        if tracer.stdout.readline() != b"0\n":
            pytest.skip("this user may trace no process")
        for pid in node.supervisor.pids.values():
            os.kill(pid, signal.SIGKILL)
        await node.wait(lambda: bool(node.of(RankExited)))
        assert [exited.rank for exited in node.of(RankExited)] == [1]
        tracer.kill()
    await node.wait(lambda: len(node.of(RankExited)) == 2)
    await node.supervisor.stop(0.0, 1.0)
    assert node.supervisor.exit_codes == {0: -signal.SIGKILL, 1: -signal.SIGKILL}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_a_child_of_another_user_is_told_and_the_others_end() -> None:
    """``sudo`` makes such a one: it can be neither killed nor waited for, which must not keep anybody from the rest."""
    program = """
import os, signal
from zspmd.process import end_children
other = os.fork()
if not other:
    os.close(1)
    signal.alarm(1)
    signal.pause()
os.setuid(65534)
if not os.fork():
    signal.pause()
left = end_children(0.2)
print(left == {other}, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, timeout=20, check=False)
    assert done.stdout == b"True\n"


async def test_a_rank_that_runs_as_another_user_gets_no_signal_and_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    reports: list[object] = []
    rank = RankProcess(0, None, reports.append, lambda: None)
    for fd in rank.open():
        os.close(fd)
    child = started("cat")
    rank.watch(child.pid)
    with monkeypatch.context() as patch:
        patch.setattr("os.killpg", refuse)
        patch.setattr("signal.pidfd_send_signal", refuse)
        rank.signal_group(signal.SIGKILL)
        rank.signal(signal.SIGTERM)
    assert rank.is_running
    rank.signal(signal.SIGKILL)
    await wait_until(lambda: not rank.is_running)
    child.returncode = rank.exit_code  # reaped by the rank
    child.communicate()
    rank.close()


async def test_an_agent_finds_its_modules_where_its_driver_does(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``PYTHONPATH=.`` or a changed sys.path too; its own directory is another one."""
    monkeypatch.setattr(sys, "path", ["here", *sys.path])
    node = await nodes.started(WAIT)
    assert node.supervisor.guard_pid is not None
    assert environment(node.supervisor.guard_pid)["PYTHONPATH"].startswith(f"{os.getcwd()}/here:")
    await node.supervisor.stop(0.0, 1.0)
