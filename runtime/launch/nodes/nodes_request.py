"""What a launch is to be, before it is known where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....config import NodesConfig

if TYPE_CHECKING:
    from ..hosts.host import Host
    from .agent_link import AgentLink


@dataclass(frozen=True)
class NodesRequest:
    """What a launch is to be.

    Attributes:
        hosts: in rank order, None for this machine alone; ``links`` are the ways to them, where the nodes have called in themselves.
        world_size: None for a rank in each slot.
        slots: of each host that has no number of its own; None for its GPUs, or one.
        devices: as in ``zspmd.launch``.
        script: a file that must be the same on all nodes; empty for none. ``cwd`` must be there; empty for this process's.
        bind: the driver's address; None for the one that fits.
        master_addr, master_port: "" and 0 for those that are chosen.
        local_places: by host, ``NodePlan.local_place``; empty where no other launcher has placed them.
        is_one_machine: whether all hosts are this machine, so that loopback is their network.
    """

    launch_id: str
    hosts: tuple[Host, ...] | None
    config: NodesConfig
    world_size: int | None = None
    slots: int | None = None
    devices: str | Sequence[str] = "auto"
    script: str = ""
    cwd: str = ""
    bind: str | None = None
    master_addr: str = ""
    master_port: int = 0
    links: tuple[AgentLink | None, ...] | None = None
    local_places: tuple[tuple[int, int], ...] = ()
    is_one_machine: bool = False
