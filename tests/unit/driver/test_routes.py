"""Which ranks reach the driver by which sockets."""

from __future__ import annotations

import pytest

from zspmd.runtime.driver.routes import Routes
from zspmd.runtime.launch.plan import LaunchPlan, NodePlan, RankPlan

ADDRESS = "192.0.2.1"
BOUND_BOTH = ["tcp://192.0.2.1:5000", "ipc:///run/here/step"]


class Directory:
    """Names endpoints as a run directory does."""

    def endpoint(self, name: str) -> str:
        return f"ipc:///run/here/{name}"


def plan(*nodes: tuple[bool, int]) -> LaunchPlan:
    """Return the plan of nodes, each (whether it is the driver's, its number of ranks)."""
    places = [(node, local) for node, (_, num_ranks) in enumerate(nodes) for local in range(num_ranks)]
    return LaunchPlan(
        launch_id="it",
        world_size=len(places),
        ranks=tuple(RankPlan(rank, local, node, "cpu") for rank, (node, local) in enumerate(places)),
        master_addr=ADDRESS,
        master_port=1,
        nodes=tuple(NodePlan(f"node{number}", ADDRESS, f"/run/{number}", is_local) for number, (is_local, _) in enumerate(nodes)),
    )


LOCAL, REMOTE = (True, 2), (False, 2)


@pytest.mark.parametrize(
    ("nodes", "is_all_tcp", "endpoints", "on_tcp"),
    [
        ([LOCAL], False, ["ipc:///run/here/step"], [False, False]),
        ([LOCAL], True, ["tcp://192.0.2.1:*"], [True, True]),
        ([REMOTE], False, ["tcp://192.0.2.1:*"], [True, True]),
        ([LOCAL, REMOTE], False, ["tcp://192.0.2.1:*", "ipc:///run/here/step"], [False, False, True, True]),
        ([REMOTE, LOCAL], False, ["tcp://192.0.2.1:*", "ipc:///run/here/step"], [True, True, False, False]),
    ],
    ids=["here", "here, by TCP", "elsewhere", "here and elsewhere", "elsewhere and here"],
)
def test_what_is_bound_and_who_uses_it(nodes: list[tuple[bool, int]], is_all_tcp: bool, endpoints: list[str], on_tcp: list[bool]) -> None:
    routes = Routes(plan(*nodes), ADDRESS, is_all_tcp=is_all_tcp)
    assert routes.endpoints(Directory(), "step") == endpoints
    assert routes.has_tcp is any(on_tcp)
    for rank, is_tcp in enumerate(on_tcp):
        assert routes.is_tcp(rank) is is_tcp
        assert routes.endpoint(rank, endpoints).startswith("tcp" if is_tcp else "ipc")
        assert routes.step_endpoint(rank, endpoints) == routes.endpoint(rank, endpoints)
    assert routes.relayed == {}


def test_relayed_ranks_take_steps_in_their_run_directory_and_nothing_else_there() -> None:
    routes = Routes(plan(LOCAL, REMOTE, REMOTE), ADDRESS, relay_mode="on")
    assert routes.relayed == {1: (2, 3), 2: (4, 5)}
    assert [routes.is_relayed(rank) for rank in range(6)] == [False, False, True, True, True, True]
    assert routes.step_endpoint(0, BOUND_BOTH) == BOUND_BOTH[1]
    assert routes.step_endpoint(2, BOUND_BOTH) == routes.relay_endpoint(1) == "ipc:///run/1/step"
    assert routes.step_endpoint(5, BOUND_BOTH) == "ipc:///run/2/step"
    assert routes.endpoint(2, BOUND_BOTH) == routes.upstream(BOUND_BOTH) == BOUND_BOTH[0]


def test_auto_relays_the_nodes_with_many_ranks() -> None:
    assert Routes(plan((True, 64), (False, 1), (False, 64)), ADDRESS, relay_mode="auto").relayed == {2: tuple(range(65, 129))}


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_ranks_of_the_drivers_node_need_no_relay(mode: str) -> None:
    assert Routes(plan((True, 64)), ADDRESS, is_all_tcp=True, relay_mode=mode).relayed == {}
