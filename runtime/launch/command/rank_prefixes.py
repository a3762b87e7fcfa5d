"""What stands before the lines of ranks: ``[rank 3]`` on one node, ``[3@node1]`` on several, padded so that lines begin at one column."""

from __future__ import annotations

from collections.abc import Sequence

from ..hosts.host import Host
from ..plan import LaunchPlan, place_ranks


def rank_prefixes(world_size: int, hosts: Sequence[str] = ()) -> list[str]:
    """Return the prefix of each rank, with a blank behind it; ``hosts`` are names by rank where there are several nodes."""
    width = len(str(world_size - 1))
    if not hosts:
        return [f"[rank {rank:>{width}}] " for rank in range(world_size)]
    names = [f"[{rank}@{host}]" for rank, host in enumerate(hosts)]
    longest = max(map(len, names))
    return [f"{name:<{longest}} " for name in names]


def rank_hosts(hosts: Sequence[Host], world_size: int) -> list[str]:
    """Return the name of the host of each rank, where there are several and all say how many slots they have; else nothing."""
    slots = [host.slots for host in hosts]
    if len(hosts) < 2 or None in slots:
        return []
    return [hosts[node].name for node, _ in place_ranks([host.name for host in hosts], [number or 0 for number in slots], world_size)]


def plan_prefixes(plan: LaunchPlan) -> list[str]:
    """Return the prefixes of the ranks of a plan."""
    hosts = [plan.node_of(place.rank).name for place in plan.ranks] if len(plan.nodes) > 1 else ()
    return rank_prefixes(plan.world_size, hosts)
