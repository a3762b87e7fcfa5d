"""Plans and processes for records of launches that never were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from zspmd.runtime.launch.plan import LaunchPlan, NodePlan, RankPlan


@dataclass(frozen=True)
class SomeProcesses:
    """What a ``NodeSupervisor`` tells of its node."""

    pids: Mapping[int, int] = field(default_factory=dict)
    agent_pid: int | None = None
    guard_pid: int | None = None


def some_plan(launch_id: str, *hosts: str) -> LaunchPlan:
    """Return a plan of one rank on each host, of which the first is this machine."""
    names = hosts or ("localhost",)
    return LaunchPlan(
        launch_id=launch_id,
        world_size=len(names),
        ranks=tuple(RankPlan(rank, 0, rank, "cpu") for rank in range(len(names))),
        master_addr="127.0.0.1",
        master_port=1,
        nodes=tuple(NodePlan(name, f"10.0.0.{rank + 1}", "/run", is_local=rank == 0) for rank, name in enumerate(names)),
    )
