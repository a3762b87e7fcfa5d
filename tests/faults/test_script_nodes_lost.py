"""Launches over several nodes that lose one: a process of the machinery is killed, a link is cut, a machine goes, or one stands still."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest
from support.cluster import Cluster
from support.node_faults import named, paused, ranks
from support.polling import block_until
from support.script_nodes import Ended, ScriptNodes, finish
from support.script_nodes import script_nodes as script_nodes
from support.sshd import SshServers

WAITS = ("--no-python", "sh", "-c", "echo ready; exec sleep 600")
LEASE_S = 2.0
LEASE = ("--node-timeout", f"{LEASE_S:g}")
# What a lease may take longer: its last beat, and a busy machine.
MARGIN_S = 2.0
ENDED_S = 2.0


@pytest.fixture
def any_rsh(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """What reaches the hosts."""
    if request.param == "rsh":
        return cluster.rsh()
    servers: SshServers = request.getfixturevalue("ssh_servers")
    return servers.command


def is_running(script_nodes: ScriptNodes, index: int) -> bool:
    return bool(ranks(script_nodes.hosts[index]))


def check_lost(ended: Ended, node_rank: int, lost: str, why: str) -> None:
    """Assert that the launch ended with the loss of a node, which is named with its ranks and the reason."""
    assert ended.code == 121, ended.errors
    assert f"node {node_rank} (node{node_rank}) is lost, with ranks {lost}: " in ended.errors
    assert re.search(why, ended.errors), ended.errors


# --- a process is killed ---


@pytest.mark.parametrize("any_rsh", [pytest.param("rsh", marks=pytest.mark.long), "ssh"], indirect=True)
@pytest.mark.parametrize(
    ("who", "why"),
    [("agent", "SIGKILL|exited with code 137"), ("guard", "the guard of its agent, pid .* is gone"), ("client", "was ended by SIGKILL")],
)
def test_the_death_of_one_that_holds_another_node_is_named(script_nodes: ScriptNodes, any_rsh: str, who: str, why: str) -> None:
    process = script_nodes.begin(*WAITS, rsh=any_rsh, num_ready=4)
    killed = time.monotonic()
    os.kill(script_nodes.victim(process, who, 1), signal.SIGKILL)
    ended = finish(process, since=killed)
    check_lost(ended, 1, "2", why)
    assert ended.elapsed_s < ENDED_S
    script_nodes.cluster.check_nothing_left(ENDED_S)


@pytest.mark.parametrize("who", ["agent", "guard"])
def test_the_death_of_one_that_holds_the_launcher_s_node_is_named(script_nodes: ScriptNodes, who: str) -> None:
    process = script_nodes.begin(*WAITS, num_ready=4)
    killed = time.monotonic()
    os.kill(script_nodes.victim(process, who, 0), signal.SIGKILL)
    ended = finish(process, since=killed)
    check_lost(ended, 0, "0, 1", f"the {'guard of this node.s agent' if who == 'guard' else 'agent of this node'}, pid .*SIGKILL")
    assert ended.elapsed_s < ENDED_S
    script_nodes.cluster.check_nothing_left(ENDED_S)


@pytest.mark.parametrize("any_rsh", ["rsh", "ssh"], indirect=True)
def test_the_death_of_the_launcher_leaves_nothing_on_any_node(script_nodes: ScriptNodes, any_rsh: str) -> None:
    process = script_nodes.begin(*WAITS, rsh=any_rsh, num_ready=4)
    process.kill()
    script_nodes.cluster.check_nothing_left(ENDED_S)
    assert finish(process, since=time.monotonic()).code == -signal.SIGKILL


def test_the_death_of_agent_and_guard_at_once_ends_their_ranks(script_nodes: ScriptNodes) -> None:
    """The kernel does it. Nobody is left there who could remove the run directory; the next launch does."""
    process = script_nodes.begin(*WAITS, num_ready=4)
    killed = time.monotonic()
    os.killpg(script_nodes.victim(process, "guard", 1), signal.SIGKILL)
    ended = finish(process, since=killed)
    check_lost(ended, 1, "2", "rsh_client.py|python node1")
    assert ended.elapsed_s < ENDED_S
    block_until(lambda: not script_nodes.hosts[1].processes(), ENDED_S)
    script_nodes.hosts[1].remove_left_behind()


# --- a link is cut, a machine goes ---


@pytest.mark.parametrize("at", ["switch", pytest.param("host", marks=pytest.mark.long)])
def test_a_node_behind_a_cut_link_is_lost_on_both_sides_and_stays_so(script_nodes: ScriptNodes, at: str) -> None:
    process = script_nodes.begin(*LEASE, *WAITS, num_ready=4)
    cut = time.monotonic()
    script_nodes.cluster.cut(1, at=at)
    ended = finish(process, since=cut)
    check_lost(ended, 1, "2", f"nothing was heard of it for {LEASE_S:g} s")
    assert LEASE_S - 1.0 < ended.elapsed_s < LEASE_S + MARGIN_S
    assert not is_running(script_nodes, 0)
    block_until(lambda: not is_running(script_nodes, 1), LEASE_S + MARGIN_S - ended.elapsed_s)  # the link is cut still
    block_until(lambda: not named(script_nodes.hosts[1], "zspmd-agent"), MARGIN_S)
    script_nodes.cluster.heal(1)
    script_nodes.cluster.check_nothing_left(10.0)


def test_a_cut_link_that_heals_in_time_is_no_loss(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin(
        "-q", "--node-timeout", "6", *script_nodes.by_rank({}, others=script_nodes.when_told("hostname")), num_ready=4
    )
    script_nodes.cluster.cut(1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    script_nodes.cluster.heal(1)
    ended = finish(process, since=script_nodes.go())
    assert (ended.code, ended.errors) == (0, "")
    assert sorted(line.partition("] ")[2] for line in ended.out.splitlines()) == ["node0", "node0", "node1", "node2"]


def test_a_node_that_stood_still_while_the_link_was_cut_ends_when_both_are_over(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin(*LEASE, *WAITS, num_ready=4)
    host = script_nodes.hosts[1]
    with paused(*host.processes()):
        script_nodes.cluster.cut(1)
        ended = finish(process, since=time.monotonic())
        check_lost(ended, 1, "2", "nothing was heard of it")
        script_nodes.cluster.heal(1)
        assert is_running(script_nodes, 1)
    block_until(lambda: not host.processes(), LEASE_S + MARGIN_S)


def test_a_node_without_power_is_lost_and_is_empty_when_it_comes_back(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin(*LEASE, *WAITS, num_ready=4)
    since = time.monotonic()
    script_nodes.cluster.power_off(1)
    ended = finish(process, since=since)
    check_lost(ended, 1, "2", f"nothing was heard of it for {LEASE_S:g} s")
    assert LEASE_S - 1.0 < ended.elapsed_s < LEASE_S + MARGIN_S
    script_nodes.cluster.heal(1)
    script_nodes.hosts[1].remove_left_behind()  # what a machine without power leaves on its disk is not ours to remove
    script_nodes.cluster.check_nothing_left(ENDED_S)


@pytest.mark.long
def test_of_two_nodes_that_are_lost_one_is_the_cause_and_both_end(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin(*LEASE, *WAITS, num_ready=4)
    cut = time.monotonic()
    for index in (1, 2):
        script_nodes.cluster.cut(index)
    ended = finish(process, since=cut)
    assert ended.code == 121
    assert re.search(r"node (1|2) \(node\1\) is lost, with ranks", ended.errors)
    assert ended.elapsed_s < LEASE_S + MARGIN_S
    block_until(lambda: not any(is_running(script_nodes, index) for index in range(3)), LEASE_S + MARGIN_S)
    for index in (1, 2):
        script_nodes.cluster.heal(index)


# --- somebody stands still ---


def test_a_launcher_that_stands_still_for_less_than_the_lease_loses_nobody(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin(
        "-q", "--node-timeout", "3", *script_nodes.by_rank({}, others=script_nodes.when_told("exit 0")), num_ready=4
    )
    with paused(process.pid):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        assert all(is_running(script_nodes, index) for index in range(3))
    ended = finish(process, since=script_nodes.go())
    assert (ended.code, ended.errors) == (0, "")


def test_a_launcher_that_stands_still_for_longer_finds_its_nodes_gone(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin(*LEASE, *WAITS, num_ready=4)
    with paused(process.pid):
        stopped = time.monotonic()
        block_until(lambda: not is_running(script_nodes, 1) and not is_running(script_nodes, 2), LEASE_S + MARGIN_S)
        assert time.monotonic() - stopped > LEASE_S - 1.0
    ended = finish(process, since=time.monotonic())
    assert ended.code == 121
    assert re.search(r"node (1|2) \(node\1\) is lost, with ranks [23]: nothing was heard of the driver for 2 s", ended.errors), ended.errors
    assert ended.elapsed_s < MARGIN_S


@pytest.mark.parametrize("is_long", [pytest.param(False, id="less than the lease", marks=pytest.mark.long), pytest.param(True, id="more")])
def test_an_agent_that_stands_still(script_nodes: ScriptNodes, is_long: bool) -> None:
    command = script_nodes.by_rank({}, others=script_nodes.when_told("exit 0"))
    process = script_nodes.begin("--node-timeout", "2.5", *command, num_ready=4)
    since = time.monotonic()
    with paused(script_nodes.victim(process, "agent", 1)):
        if is_long:
            ended = finish(process, since=since)
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.2)
    if is_long:
        check_lost(ended, 1, "2", "nothing was heard of it for 2.5 s")
        assert ended.elapsed_s < 2.5 + MARGIN_S
    else:
        assert finish(process, since=script_nodes.go()).code == 0
    script_nodes.cluster.check_nothing_left(5.0)


@pytest.mark.long
@pytest.mark.parametrize(("pause_s", "is_lost"), [(10.0, False), (20.0, True)], ids=["10 s", "20 s"])
def test_a_launcher_that_stands_still_with_the_default_lease(script_nodes: ScriptNodes, pause_s: float, is_lost: bool) -> None:
    process = script_nodes.begin(*script_nodes.by_rank({}, others=script_nodes.when_told("exit 0")), num_ready=4)
    with paused(process.pid), pytest.raises(subprocess.TimeoutExpired):
        process.wait(pause_s)
    assert finish(process, since=script_nodes.go()).code == (121 if is_lost else 0)
