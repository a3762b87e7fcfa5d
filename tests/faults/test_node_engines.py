"""An engine over several hosts that streams while one of them is cut off: it ends with the reason, or goes on elsewhere."""

from __future__ import annotations

import time

import pytest
from support.cluster import Cluster
from support.node_launch import NodeLaunch
from support.one_node_engine import REQUESTS, generate_here

LEASE_S = 2.0
LATE_S = 1.0
GONE_S = 20.0
LONG = ("zspmd is", {"temperature": 1.0, "seed": 5, "max_tokens": 400, "ignore_eos": True})


@pytest.mark.parametrize("rsh", ["ssh"], indirect=True)
def test_a_cut_host_ends_the_streams_and_nothing_comes_back_to_life(cluster: Cluster, rsh: str) -> None:
    with NodeLaunch(cluster, rsh, program="support.node_engine", lease_s=LEASE_S, slots=(2, 1, 1)) as launch:
        launch.wait("ready", timeout_s=60.0)
        launch.order("generate", "long", *LONG)
        launch.wait("token", number=10)
        cut = time.monotonic()
        cluster.cut(2)
        raised = launch.wait("raised")
        launch.order("close")
        launch.finish()
        cluster.check_nothing_left(GONE_S)
    text = f"node 2 (node2) is lost, with ranks 3: nothing was heard of it for {LEASE_S:g} s; "
    assert raised["text"] == text + "what runs there ends by itself once it has heard nothing for as long"
    assert (raised["kind"], raised["host"], raised["ranks"]) == ("NodeLostError", "node2", [3])
    assert raised["at"] - cut < LEASE_S + LATE_S
    cluster.heal(2)
    time.sleep(LEASE_S)  # in which something could come back
    cluster.check_nothing_left(0.0)


def test_streams_go_on_in_spare_slots_and_end_when_there_are_none(cluster: Cluster, rsh: str) -> None:
    launch = NodeLaunch(cluster, rsh, program="support.node_engine", slots=(1, 1, 1), lease_s=LEASE_S, world_size=2, max_restarts=3)
    with launch:
        assert launch.wait("ready", timeout_s=60.0)["hosts"] == ["node0", "node1"]
        for name, request in REQUESTS.items():
            launch.order("generate", name, *request)
        launch.wait("token", request="seeded", number=10)
        cluster.cut(1)
        finished = [launch.wait("finished") for _ in REQUESTS]
        launch.order("generate", "long", *LONG)
        launch.wait("token", request="long", number=10)
        cluster.cut(2)
        raised = launch.wait("raised")
        launch.order("close")
        launch.finish()
        cluster.check_nothing_left(GONE_S)
    assert {event["request"]: event["token_ids"] for event in finished} == generate_here(2, REQUESTS)
    first, second = (event["line"] for event in launch.told("restart"))
    assert first.startswith("node 1 (node1) is lost, with ranks 1: ")
    assert first.endswith("; restarting the workers, 3 requests go on")
    assert second.startswith("node 1 (node2) is lost, with ranks 1: ")
    assert raised["kind"] == "TopologyError"
    assert raised["text"] == "2 ranks do not fit into 1 slot (node0 1); add hosts, give them more slots=, or ask for fewer ranks"
    assert (raised["cause"]["kind"], raised["cause"]["host"]) == ("NodeLostError", "node2")
    assert launch.errors == ""
