"""An agent or guard that is paused, and stacks asked for through an agent; each test ends with nothing left."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import Any

import pytest
from support.nodes import DAEMON, STUBBORN, WAIT, Node, Nodes
from support.nodes import nodes as nodes
from support.nodes import runtime_dir as runtime_dir
from support.polling import wait_until

from zspmd.runtime.launch import agent_process, supervisor
from zspmd.runtime.launch.agent_protocol import AgentGone, RankExited
from zspmd.runtime.launch.supervisor import AgentLost, NodeSupervisor

OFFER = "from zspmd.process import offer_stacks; offer_stacks()\n"
SPIN = OFFER + "def spinning():\n    print('ready', flush=True)\n    while True: pass\nspinning()"
LEAVES_ON_SIGTERM = "import os, signal; signal.signal(signal.SIGTERM, lambda *_: os._exit(3))\n" + WAIT


def state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


async def stopped(pid: int | None) -> int:
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    await wait_until(lambda: state(pid) == "T")
    return pid


async def ready(nodes: Nodes, program: str, world_size: int = 1, **fields: Any) -> Node:
    node = await nodes.started(program, world_size, **fields)
    await node.wait(lambda: all(node.lines(rank) for rank in range(world_size)))
    return node


@pytest.mark.parametrize("pause_s", [1.0, pytest.param(10.0, marks=pytest.mark.long)])
async def test_a_pause_of_the_agent_ends_nothing(nodes: Nodes, pause_s: float) -> None:
    node = await ready(nodes, LEAVES_ON_SIGTERM, 2)
    agent_pid = await stopped(node.supervisor.agent_pid)
    await asyncio.sleep(pause_s)
    os.kill(agent_pid, signal.SIGCONT)
    assert await node.supervisor.stop(0.0, 5.0) == {0: 3, 1: 3}
    assert node.of(AgentLost) == []


async def test_a_pause_of_the_agent_takes_nothing_from_the_time_after_sigterm(nodes: Nodes) -> None:
    """It is stopped when SIGTERM is not due yet, and goes on when SIGKILL would have been."""
    node = await ready(nodes, LEAVES_ON_SIGTERM)
    stopping = asyncio.ensure_future(node.supervisor.stop(0.5, 0.6))
    await node.supervisor.dump_stacks(5.0)  # answered, so what was asked before has arrived
    agent_pid = await stopped(node.supervisor.agent_pid)
    await asyncio.sleep(1.5)
    os.kill(agent_pid, signal.SIGCONT)
    assert await stopping == {0: 3}


@pytest.mark.parametrize("victim", ["agent", "guard"])
async def test_one_that_stays_paused_is_killed_when_all_is_to_end(nodes: Nodes, monkeypatch: pytest.MonkeyPatch, victim: str) -> None:
    monkeypatch.setattr(supervisor, "_MARGIN_S", 0.3)
    monkeypatch.setattr(agent_process, "_KILLED_S", 0.5)
    node = await ready(nodes, DAEMON if victim == "agent" else STUBBORN)
    if victim == "agent":
        nodes.watch(int(node.lines(0)[0].split()[1]))
    for pid in node.supervisor.pids.values():
        nodes.watch(pid)
    await stopped(node.supervisor.agent_pid if victim == "agent" else node.supervisor.guard_pid)
    await node.supervisor.stop(0.0, 0.1)
    assert bool(node.of(AgentGone)) == (victim == "guard")


async def test_the_death_of_the_guard_ends_all_and_is_told_before_the_end_of_any_rank(nodes: Nodes) -> None:
    node = await ready(nodes, STUBBORN, 2)
    for pid in node.supervisor.pids.values():
        nodes.watch(pid)
    guard_pid, agent_pid = node.supervisor.guard_pid, node.supervisor.agent_pid
    assert guard_pid is not None
    assert agent_pid is not None
    nodes.watch(agent_pid)
    os.kill(guard_pid, signal.SIGKILL)
    await node.wait(lambda: bool(node.of(AgentLost)))
    assert node.of(AgentLost)[0].reason.startswith(f"the guard of this node's agent, pid {guard_pid}, was ended by SIGKILL")
    await node.supervisor.stop(1.0, 1.0)
    assert node.of(RankExited) == []


# --- stacks ---


async def test_stacks_come_by_rank_also_when_asked_for_twice_at_once(nodes: Nodes) -> None:
    node = await ready(nodes, "", 2, argv=(sys.executable, "-c", SPIN))
    await stopped(node.supervisor.pids[1])
    first, second = await asyncio.gather(node.supervisor.dump_stacks(5.0), node.supervisor.dump_stacks(5.0))
    for stacks in (first, second):
        assert sorted(stacks) == [0, 1]
        assert stacks[0].count("in spinning") == 1
        assert stacks[1].splitlines() == [stacks[1]]
        assert "stopped by a signal" in stacks[1]
    await node.supervisor.stop(0.0, 1.0)


async def test_a_rank_that_cannot_be_asked_has_the_reason(nodes: Nodes) -> None:
    assert await NodeSupervisor(print).dump_stacks(1.0) == {}
    program = "import os\nif os.environ['RANK'] == '1': raise SystemExit(7)\n" + WAIT
    node = await nodes.started(program, 2)
    await node.wait(lambda: bool(node.of(RankExited)) and bool(node.lines(0)))
    stacks = await node.supervisor.dump_stacks(5.0)
    assert "has not offered any" in stacks[0]
    assert stacks[1] == "its process exited with code 7"
    agent_pid = await stopped(node.supervisor.agent_pid)
    began = time.monotonic()
    assert (await node.supervisor.dump_stacks(0.2))[0] == "its agent did not tell within 0.2 s"
    assert time.monotonic() - began < 2.0
    os.kill(agent_pid, signal.SIGCONT)
    await node.supervisor.stop(0.0, 1.0)
    assert (await node.supervisor.dump_stacks(1.0))[0] == "its process was ended by SIGTERM"
