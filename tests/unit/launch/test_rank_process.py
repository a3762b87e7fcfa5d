"""What is reported of a rank's end that its time does not tell."""

from __future__ import annotations

import os
import signal

import pytest
from support.nodes import STUBBORN, WAIT, Nodes
from support.nodes import nodes as nodes
from support.nodes import runtime_dir as runtime_dir

from zspmd.runtime.launch.agent_protocol import RankExited


@pytest.mark.parametrize("program", [WAIT, STUBBORN], ids=["SIGTERM", "SIGKILL"])
async def test_an_end_after_a_signal_of_the_agent_s_is_told_as_such(nodes: Nodes, program: str) -> None:
    node = await nodes.started(program, 2)
    await node.wait(lambda: all(node.lines(rank) == ["ready"] for rank in range(2)))
    os.kill(node.supervisor.pids[1], signal.SIGKILL)
    await node.wait(lambda: bool(node.of(RankExited)))
    await node.supervisor.stop(0.0, 0.2)
    assert {end.rank: end.was_signalled for end in node.of(RankExited)} == {0: True, 1: False}


async def test_a_signal_that_is_passed_on_counts_and_asking_for_stacks_does_not(nodes: Nodes) -> None:
    node = await nodes.started(WAIT, 2)
    await node.wait(lambda: all(node.lines(rank) == ["ready"] for rank in range(2)))
    await node.supervisor.dump_stacks(5.0)
    os.kill(node.supervisor.pids[1], signal.SIGKILL)
    await node.wait(lambda: bool(node.of(RankExited)))
    node.supervisor.signal_nowait(signal.SIGINT)
    await node.wait(lambda: len(node.of(RankExited)) == 2)
    await node.supervisor.stop(0.0, 0.2)
    assert {end.rank: end.was_signalled for end in node.of(RankExited)} == {0: True, 1: False}
