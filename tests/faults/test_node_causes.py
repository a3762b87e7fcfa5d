"""Which of several failures on several hosts came first, whatever their clocks show; and who is told of it, how fast."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import shifted_python
from support.cluster import Cluster
from support.node_faults import kill
from support.node_launch import NodeLaunch

SHIFT_S = 5000
APART_S = 0.02
TOLD_S = 1.0
AHEAD_S = 0.3  # until all ranks have been told when to end
EXIT_CODE = 3


@pytest.fixture
def shifted(cluster: Cluster) -> str:
    """Hand out an interpreter for hosts whose monotonic clock is ahead of the driver's."""
    path = cluster.directory / "shifted-python"
    command = shlex.join([sys.executable, "-I", "-S", str(Path(shifted_python.__file__)), str(SHIFT_S)])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    path.chmod(0o755)
    done = subprocess.run([path, "-c", "import time; print(time.monotonic())"], capture_output=True, text=True, timeout=10)
    if done.returncode == shifted_python.UNSUPPORTED:
        pytest.skip(done.stderr)
    assert float(done.stdout) > time.monotonic() + SHIFT_S - 60
    return str(path)


def end_two(cluster: Cluster, rsh: str, python: str, delays_s: list[float | None]) -> dict[str, object]:
    """Have ranks end after their delays, and return what the driver says; the host of the last rank has other clocks."""
    hosts = [*cluster.hostfile([2, 1]).splitlines(), f"node2 slots=1 python={python}"]
    with NodeLaunch(cluster, rsh, hosts=hosts) as launch:
        launch.wait("ready")
        launch.order("call", "end_after", time.time() + AHEAD_S, "os._exit", delays_s)
        launch.finish()
    (failed,) = launch.told("failed")
    return failed


@pytest.mark.parametrize(
    "order",
    [[2, 3], [3, 2], pytest.param([0, 3], marks=pytest.mark.long), pytest.param([3, 0], marks=pytest.mark.long)],
    ids=lambda order: "rank {} first, then {}".format(*order),
)
def test_the_first_of_two_failures_is_the_cause(cluster: Cluster, rsh: str, shifted: str, order: list[int]) -> None:
    delays_s: list[float | None] = [None] * 4
    for number, rank in enumerate(order):
        delays_s[rank] = number * APART_S
    failed = end_two(cluster, rsh, shifted, delays_s)
    first, second = order
    assert (failed["kind"], failed["rank"], failed["exit_code"]) == ("WorkerExitedError", first, EXIT_CODE)
    assert failed["host"] == ["node0", "node0", "node1", "node2"][first]
    assert failed["consequences"] == [f"rank {second}: exited with code {EXIT_CODE}"]


@pytest.mark.long
def test_the_first_is_found_again_and_again(cluster: Cluster, rsh: str, shifted: str) -> None:
    """At 5 ms on a busy machine a process may be late itself: where it is wrong, both are named."""
    right = 0
    for number in range(50):
        first, second = (2, 3) if number % 2 else (3, 2)
        delays_s: list[float | None] = [None] * 4
        delays_s[first], delays_s[second] = 0.0, 0.005
        failed = end_two(cluster, rsh, shifted, delays_s)
        right += failed["rank"] == first
        other = second if failed["rank"] == first else first
        assert failed["consequences"] == [f"rank {other}: exited with code {EXIT_CODE}"]
    assert right >= 49


def test_the_death_of_a_rank_elsewhere_ends_every_await_at_once(cluster: Cluster, rsh: str) -> None:
    with NodeLaunch(cluster, rsh) as launch:
        ready = launch.wait("ready")
        launch.order("steps")
        launch.order("steps")
        launch.order("call", "pause")
        launch.wait("step")
        killed = time.monotonic()
        kill(ready["pids"][3])
        launch.finish()
    raised = launch.told("raised")
    assert sorted(event["order"] for event in raised) == ["call", "steps", "steps"]
    for event in raised:
        assert (event["kind"], event["rank"], event["host"]) == ("WorkerExitedError", 3, "node2")
        assert event["at"] - killed < TOLD_S
