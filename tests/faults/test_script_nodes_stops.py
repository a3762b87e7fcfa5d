"""Launches over several nodes that somebody ends: Ctrl-C on a terminal, other signals, a terminal that is closed, ``--timeout``."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from support.script_nodes import SLOTS, ScriptNodes, finish
from support.script_nodes import script_nodes as script_nodes
from support.script_runs import script
from support.terminals import CTRL_C, IN_ITS_OWN_SESSION, Terminal, terminal

STUBBORN = script("stubborn")


@pytest.fixture
def screen() -> Iterator[Terminal]:
    """Hand out a terminal."""
    with terminal() as made:
        yield made


def begin_on(screen: Terminal, nodes: ScriptNodes, *arguments: str, num_ready: int = 4, rsh: str | None = None) -> subprocess.Popen[str]:
    """Start a launch on a terminal and return once so many ranks are ready."""
    argv = [*IN_ITS_OWN_SESSION, *nodes.argv(*arguments, rsh=rsh)]
    process = nodes.cluster.run(0, argv, cwd=nodes.directory, **screen.streams)
    screen.let_go()
    screen.read_until(lambda: screen.text.count("ready\n") == num_ready)
    return process


def end_on(screen: Terminal, process: subprocess.Popen[str], timeout_s: float = 20.0) -> int:
    """Read what is shown until the launch has ended, and return its exit code."""
    screen.read_until(lambda: process.poll() is not None, timeout_s)
    screen.read_until(lambda: not screen.read())
    return process.returncode


def told(nodes: ScriptNodes, name: str) -> list[str]:
    """Return what all ranks say that get a signal, sorted."""
    hosts = [host.name for host, count in zip(nodes.hosts, SLOTS) for _ in range(count)]
    return [f"[{rank}@{host}] got {name}" for rank, host in enumerate(hosts)]


def shown(screen: Terminal, name: str) -> list[str]:
    return sorted(line for line in screen.text.splitlines() if line.endswith(f"got {name}"))


def test_ctrl_c_lets_ranks_of_all_nodes_end_in_peace(script_nodes: ScriptNodes, screen: Terminal) -> None:
    process = begin_on(screen, script_nodes, STUBBORN, "child", "SIGINT")
    screen.type(CTRL_C)
    assert end_on(screen, process) == 130
    assert shown(screen, "SIGINT") == told(script_nodes, "SIGINT")
    assert shown(screen, "SIGTERM") == []
    assert "[zspmd] SIGINT: the ranks have 30 s to end" in screen.text
    assert "FAILED" not in screen.text
    script_nodes.cluster.check_nothing_left(1.0)


def test_ctrl_c_twice_ends_ranks_that_only_listen_to_sigterm(script_nodes: ScriptNodes, screen: Terminal) -> None:
    process = begin_on(screen, script_nodes, STUBBORN, "child", "SIGTERM")
    screen.type(CTRL_C)
    screen.read_until(lambda: shown(screen, "SIGINT") == told(script_nodes, "SIGINT"))
    screen.type(CTRL_C)
    assert end_on(screen, process) == 130
    assert shown(screen, "SIGTERM") == told(script_nodes, "SIGTERM")
    script_nodes.cluster.check_nothing_left(1.0)


def test_ctrl_c_three_times_ends_ranks_that_listen_to_nothing(script_nodes: ScriptNodes, screen: Terminal) -> None:
    process = begin_on(screen, script_nodes, STUBBORN, "child")
    for name in ("SIGINT", "SIGTERM"):
        screen.type(CTRL_C)
        screen.read_until(lambda name=name: shown(screen, name) == told(script_nodes, name))  # type: ignore[misc]
    pressed = time.monotonic()
    screen.type(CTRL_C)
    assert end_on(screen, process) == 130
    assert time.monotonic() - pressed < 2.0
    script_nodes.cluster.check_nothing_left(1.0)


def test_ctrl_c_while_nodes_are_being_reached_starts_no_rank(script_nodes: ScriptNodes, screen: Terminal) -> None:
    slow = script_nodes.cluster.rsh(delay_s=5.0)
    process = begin_on(screen, script_nodes, *script_nodes.by_rank({}, others="touch started"), num_ready=0, rsh=slow)
    script_nodes.wait_agents(1)
    pressed = time.monotonic()
    screen.type(CTRL_C)
    assert end_on(screen, process) == 130
    assert time.monotonic() - pressed < 4.0
    assert not (script_nodes.directory / "started").exists()


def test_a_terminal_that_is_closed_ends_all_ranks(script_nodes: ScriptNodes, screen: Terminal) -> None:
    process = begin_on(screen, script_nodes, STUBBORN, "child", "SIGHUP")
    closed = time.monotonic()
    screen.close()
    assert process.wait(20) == 129
    assert time.monotonic() - closed < 5.0
    script_nodes.cluster.check_nothing_left(1.0)


def test_sigterm_goes_to_ranks_of_all_nodes(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin(STUBBORN, "child", "SIGTERM", num_ready=4)
    process.send_signal(signal.SIGTERM)
    ended = finish(process, since=time.monotonic())
    assert ended.code == 143
    assert sorted(ended.out.splitlines()) == told(script_nodes, "SIGTERM")
    assert "FAILED" not in ended.errors


def test_a_launch_that_takes_too_long_is_ended_with_its_own_code(script_nodes: ScriptNodes) -> None:
    ended = script_nodes.run("--timeout", "1.5", "--grace", "0.2", "--no-python", "sh", "-c", "echo ready; exec sleep 600")
    assert ended.code == 124
    assert 1.5 < ended.elapsed_s < 8.0
