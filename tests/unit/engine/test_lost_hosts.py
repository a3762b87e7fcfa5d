from __future__ import annotations

import pytest

import zspmd
from zspmd.errors import NodeLostError, NodeProblem, PreflightError, WorkerExitedError, ZspmdError
from zspmd.runtime.engine.ranks import without_lost_hosts

HOSTS = ("node0", "lee@node1", "node2")


def left(fault: ZspmdError | None, hosts: tuple[str, ...] = HOSTS) -> list[str]:
    """Return the hosts that an engine's next ranks may have."""
    config = zspmd.launch("support.workers:Echo", world_size=1, hosts=[f"{host} slots=1" for host in hosts]).config
    return [host.target for host in without_lost_hosts(config, fault).hosts or ()]


def unusable(check: str, *hosts: str) -> PreflightError:
    return PreflightError([NodeProblem(host, check, "what", "advice") for host in hosts])


@pytest.mark.parametrize(
    ("fault", "hosts"),
    [
        pytest.param(None, ["node0", "lee@node1", "node2"], id="no fault"),
        pytest.param(NodeLostError("lost", host="node1", ranks=[2]), ["node0", "node2"], id="a lost node"),
        pytest.param(NodeLostError("lost", ranks=[0]), ["node0", "lee@node1", "node2"], id="the agent of the driver's own node"),
        pytest.param(WorkerExitedError(rank=2, host="node1", exit_code=1), ["node0", "lee@node1", "node2"], id="a rank"),
        pytest.param(unusable("agent", "lee@node1", "node2"), ["node0"], id="no answer"),
        pytest.param(unusable("torch", "node2"), ["node0", "lee@node1", "node2"], id="an answer that does not please"),
        pytest.param(unusable("agent", "node0", "lee@node1", "node2"), ["node0", "lee@node1", "node2"], id="all of them"),
    ],
)
def test_hosts_that_are_gone_are_left_out(fault: ZspmdError | None, hosts: list[str]) -> None:
    assert left(fault) == hosts
