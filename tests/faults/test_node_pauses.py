"""Processes of a launch over several hosts that are stopped for a while: what is shorter than the lease does no harm."""

from __future__ import annotations

import time

import pytest
from support.cluster import Cluster
from support.node_faults import AGENT, carriers, paused, wait_named
from support.node_launch import NodeLaunch
from support.polling import block_until

LEASE_S = 1.5
SHORT_S = 0.9
LATE_S = 1.0
GONE_S = 5.0  # from the loss


def begin(launch: NodeLaunch) -> None:
    launch.wait("ready")
    launch.order("steps")
    launch.wait("step")


@pytest.mark.parametrize("rsh", ["ssh"], indirect=True)
def test_a_pause_below_the_lease_is_no_loss(cluster: Cluster, rsh: str) -> None:
    """One after the other: the driver, an agent, what carries its stream."""
    with NodeLaunch(cluster, rsh, lease_s=LEASE_S) as launch:
        begin(launch)
        for pid in (launch.pid, wait_named(cluster.hosts[1], AGENT), *carriers(cluster.hosts[0], "node2")):
            with paused(pid):
                time.sleep(SHORT_S)  # the length of the pause
            number = launch.wait("step")["number"]
            launch.wait("step", number=number + 20)
        launch.order("close")
        launch.finish()
    assert launch.told("failed") == []
    assert launch.errors == ""


@pytest.mark.parametrize("rsh", ["ssh"], indirect=True)
@pytest.mark.parametrize("who", ["agent", "ssh"])
def test_a_longer_pause_is_the_loss_of_the_node(cluster: Cluster, rsh: str, who: str) -> None:
    """The driver ends while they are stopped; so does all that the agent had, which its guard sees to."""
    with NodeLaunch(cluster, rsh, lease_s=LEASE_S, worker_args={"has_daemon": True}) as launch:
        begin(launch)
        began = time.monotonic()
        with paused(wait_named(cluster.hosts[1], AGENT) if who == "agent" else carriers(cluster.hosts[0], "node1")[0]):
            launch.finish()
            cluster.check_nothing_left(GONE_S)
    (failed,) = launch.told("failed")
    assert (failed["kind"], failed["host"], failed["ranks"]) == ("NodeLostError", "node1", [2])
    assert ": nothing was heard of it for 1.5 s;" in failed["text"]
    assert LEASE_S - LATE_S < failed["at"] - began < LEASE_S + LATE_S


@pytest.mark.parametrize("rsh", ["ssh"], indirect=True)
def test_a_driver_that_is_stopped_for_longer_finds_that_its_nodes_have_ended(cluster: Cluster, rsh: str) -> None:
    with NodeLaunch(cluster, rsh, lease_s=LEASE_S, worker_args={"has_daemon": True}) as launch:
        begin(launch)
        with paused(launch.pid):
            began = time.monotonic()
            block_until(lambda: not cluster.processes(1) + cluster.processes(2), LEASE_S + GONE_S)
            assert time.monotonic() - began > LEASE_S - LATE_S
        launch.finish()
        cluster.check_nothing_left(GONE_S)
    (failed,) = launch.told("failed")
    assert failed["kind"] == "NodeLostError"
    assert failed["host"] in ("node1", "node2")
    assert failed["text"].endswith(": nothing was heard of the driver for 1.5 s, so everything here ends")
