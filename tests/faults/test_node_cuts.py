"""Links that are cut, and hosts that lose power, under a launch: both sides end, the right one is named, and a short cut does no harm."""

from __future__ import annotations

import time

import pytest
from support.cluster import Cluster
from support.node_launch import NodeLaunch

from zspmd.process import CONNECTION_LOST

LEASE_S = 2.0
LATE_S = 1.0  # after the lease
GONE_S = 20.0
LOST = (
    "node 2 (node2) is lost, with ranks 3: nothing was heard of it for 2 s; "
    "what runs there ends by itself once it has heard nothing for as long"
)


@pytest.mark.parametrize(
    ("rsh", "how"),
    [
        pytest.param("rsh", "switch", id="in between", marks=pytest.mark.long),  # the quick one has an engine
        pytest.param("rsh", "host", id="at the host, which knows"),
        pytest.param("ssh", "power", id="no power"),
    ],
    indirect=["rsh"],
)
def test_both_sides_of_a_cut_end_by_the_lease(cluster: Cluster, rsh: str, how: str) -> None:
    """Each rank has left a process in a session of its own, which minds no signal but SIGKILL."""
    with NodeLaunch(cluster, rsh, lease_s=LEASE_S, worker_args={"has_daemon": True}) as launch:
        launch.wait("ready")
        launch.order("steps")
        launch.wait("step")
        cut = time.monotonic()
        if how == "power":
            cluster.power_off(2)
        else:
            cluster.cut(2, at=how)
        cluster.check_nothing_left(GONE_S)
        launch.finish()
    (failed,) = launch.told("failed")
    assert (failed["kind"], failed["text"], failed["host"], failed["ranks"]) == ("NodeLostError", LOST, "node2", [3])
    assert failed["at"] - cut < LEASE_S + LATE_S
    assert launch.errors == ""
    cluster.heal(2)
    assert [pid for index in range(3) for pid in cluster.processes(index)] == []


def test_a_cut_of_a_second_delays_steps_and_loses_none(cluster: Cluster, rsh: str) -> None:
    with NodeLaunch(cluster, rsh, lease_s=6.0) as launch:  # TCP sends again 1.4 s after the cut, or 3 s
        launch.wait("ready")
        launch.order("steps")
        launch.wait("step")
        cluster.cut(2)
        time.sleep(1.0)  # the length of the cut
        cluster.heal(2)
        begun = launch.wait("step")["number"]
        launch.wait("step", number=begun + 50)
        launch.order("close")
        launch.finish()
    assert launch.told("failed") == []


def test_a_cut_that_breaks_connections_but_not_the_lease_ends_the_ranks_behind_it(cluster: Cluster, rsh: str) -> None:
    """What was on its way to them is lost; their agent lives, and tells it when the link is there again."""
    with NodeLaunch(cluster, rsh, lease_s=20.0) as launch:
        launch.wait("ready")
        launch.order("steps")
        launch.wait("step")
        cluster.cut(2)
        time.sleep(5.0)  # the length of the cut
        cluster.heal(2)
        healed = time.monotonic()
        launch.finish()
        cluster.check_nothing_left(GONE_S)
    (failed,) = launch.told("failed")
    assert (failed["kind"], failed["rank"], failed["host"], failed["exit_code"]) == ("WorkerExitedError", 3, "node2", CONNECTION_LOST)
    assert "connection to the driver broke; what was on its way is lost, so this rank ends" in failed["text"]
    assert failed["at"] - healed < 8.0  # TCP tries again after twice as long each time
