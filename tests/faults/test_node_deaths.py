"""Whichever single process of a launch over several hosts is killed: it is named, and nothing is left on any of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.cluster import Cluster
from support.host_proc import comm_of
from support.node_faults import AGENT, GUARD, carriers, kill, wait_named
from support.node_launch import NodeLaunch

GONE_S = 5.0  # from the end of the one process to that of all others
TOLD_S = 2.0
KILLED = r"was ended by SIGKILL \(if nobody sent it, the kernel's out-of-memory killer may have: see dmesg\)"


@dataclass(frozen=True)
class Death:
    """A process to kill, by which way the hosts are reached meanwhile, and what the driver says of it: a pattern, and fields."""

    victim: Callable[[Cluster, dict[str, Any]], int]
    way: str
    text: str
    fields: dict[str, Any] = field(default_factory=dict)


def lost(node_rank: int, ranks: list[int], victim: Callable[[Cluster, dict[str, Any]], int], way: str, how: str) -> Death:
    text = rf"node {node_rank} \(node{node_rank}\) is lost, with ranks {', '.join(map(str, ranks))}: {how}"
    return Death(victim, way, text, {"kind": "NodeLostError", "host": f"node{node_rank}" if node_rank else "", "ranks": ranks})


def session(cluster: Cluster, ready: dict[str, Any]) -> int:
    """Return the process of the ssh server that serves the agent of node1."""
    (pid,) = [pid for pid in cluster.hosts[1].killable() if comm_of(pid).startswith("sshd")]
    return pid


DEATHS = {
    "guard here": lost(
        0, [0, 1], lambda cluster, _: wait_named(cluster.hosts[0], GUARD), "rsh", rf"the guard of this node's agent, pid \d+, {KILLED}"
    ),
    "agent here": lost(
        0, [0, 1], lambda cluster, _: wait_named(cluster.hosts[0], AGENT), "rsh", rf"the agent of this node, pid \d+, {KILLED}"
    ),
    "guard there": lost(
        1,
        [2],
        lambda cluster, _: wait_named(cluster.hosts[1], GUARD),
        "ssh",
        r"the guard of its agent, pid \d+, is gone, so it ends all that runs there",
    ),
    "agent there": lost(
        1,
        [2],
        lambda cluster, _: wait_named(cluster.hosts[1], AGENT),
        "ssh",
        rf"ssh node1 exited with code 255: zspmd: the agent of this node, pid \d+, {KILLED}",
    ),
    "rank there": Death(
        lambda _, ready: int(ready["pids"][2]),
        "rsh",
        rf"rank 2 on node1 \(pid \d+\) in step \d+: {KILLED}\n  last lines of its log:\n    rank 2 sets up",
        {"kind": "WorkerExitedError", "host": "node1", "rank": 2, "exit_code": -9},
    ),
    "ssh": lost(1, [2], lambda cluster, _: carriers(cluster.hosts[0], "node1")[0], "ssh", f"ssh node1 {KILLED}"),
    "another rsh": lost(1, [2], lambda cluster, _: carriers(cluster.hosts[0], "node1")[0], "rsh", f"python[0-9.]* node1 {KILLED}"),
    "session of sshd": lost(1, [2], session, "ssh", r"ssh node1 exited with code 255: Connection to node1 closed by remote host\."),
}
SLOW = ("another rsh",)  # it is as ssh


def run_until(cluster: Cluster, rsh: str, kill_one: Callable[[NodeLaunch, dict[str, Any]], None]) -> tuple[NodeLaunch, float]:
    """Have one process of a busy launch killed, and return the launch and when that was, once nothing is left.

    Each rank has left a process in a session of its own, which minds no signal but SIGKILL.
    """
    with NodeLaunch(cluster, rsh, worker_args={"has_daemon": True}) as launch:
        ready = launch.wait("ready")
        launch.order("steps")
        launch.wait("step")
        killed = time.monotonic()
        kill_one(launch, ready)
        cluster.check_nothing_left(GONE_S)
        launch.finish()
    return launch, killed


@pytest.mark.parametrize(
    ("rsh", "death"),
    [pytest.param(death.way, death, id=name, marks=[pytest.mark.long] * (name in SLOW)) for name, death in DEATHS.items()],
    indirect=["rsh"],
)
def test_the_death_of_one_process_is_told_and_ends_all(cluster: Cluster, rsh: str, death: Death) -> None:
    launch, killed = run_until(cluster, rsh, lambda _, ready: kill(death.victim(cluster, ready)))
    (failed,) = launch.told("failed")
    assert re.fullmatch(death.text, failed["text"]), failed["text"]
    assert death.fields.items() <= failed.items()
    assert failed["at"] - killed < TOLD_S
    assert launch.errors == ""


@pytest.mark.parametrize("rsh", ["ssh", pytest.param("rsh", marks=pytest.mark.long)], indirect=True)
def test_the_death_of_the_driver_ends_all(cluster: Cluster, rsh: str) -> None:
    launch, killed = run_until(cluster, rsh, lambda launch, _: kill(launch.pid))
    assert launch.told("failed") == []
    assert time.monotonic() - killed < GONE_S
