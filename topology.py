"""Ranks on mesh axes: pure arithmetic, no processes.

Ranks are laid out as ``arange(world_size).reshape(dp, pp, tp)``: tp varies fastest, so that its ranks are neighbours on a node.
The expert axis ``ep`` spans the ranks of one pipeline stage over dp and tp.

    world 8 = dp 2 x pp 2 x tp 2            tp groups: 01 23 45 67
        dp 0: pp 0: 0 1   pp 1: 2 3         pp groups: 02 13 46 57
        dp 1: pp 0: 4 5   pp 1: 6 7         dp groups: 04 15 26 37    ep groups (ep 4): 0145 2367
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import ParallelConfig
from .errors import TopologyError

AXES = ("world", "dp", "pp", "tp", "ep")


@dataclass(frozen=True)
class AxisGroup:
    """The ranks that share one axis with a given rank.

    ``ranks`` are world ranks in axis order; ``index`` is the given rank's place among them.
    """

    axis: str
    ranks: tuple[int, ...]
    index: int

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def rank(self) -> int:
        """The world rank that this group was asked for."""
        return self.ranks[self.index]

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1

    @property
    def next_rank(self) -> int:
        """World rank of the next place on the axis, wrapping round."""
        return self.ranks[(self.index + 1) % self.size]

    @property
    def previous_rank(self) -> int:
        """World rank of the place before, wrapping round."""
        return self.ranks[(self.index - 1) % self.size]


def axis_groups(parallel: ParallelConfig, axis: str) -> list[tuple[int, ...]]:
    """Return every group of an axis; each rank is in exactly one.

    Raises:
        TopologyError: no such axis.
    """
    dp, pp, tp, ep = parallel.dp, parallel.pp, parallel.tp, parallel.ep
    if axis == "world":
        return [tuple(range(parallel.world_size))]
    if axis == "tp":
        return [tuple((d * pp + p) * tp + t for t in range(tp)) for d in range(dp) for p in range(pp)]
    if axis == "pp":
        return [tuple((d * pp + p) * tp + t for p in range(pp)) for d in range(dp) for t in range(tp)]
    if axis == "dp":
        return [tuple((d * pp + p) * tp + t for d in range(dp)) for p in range(pp) for t in range(tp)]
    if axis == "ep":
        stages = [[(d * pp + p) * tp + t for d in range(dp) for t in range(tp)] for p in range(pp)]
        return [tuple(stage[i : i + ep]) for stage in stages for i in range(0, len(stage), ep)]
    raise TopologyError(f"no mesh axis {axis!r}; the axes are {', '.join(AXES)}")


def axis_group(parallel: ParallelConfig, axis: str, rank: int) -> AxisGroup:
    """Return the group of ``axis`` that ``rank`` belongs to.

    Raises:
        TopologyError: no such axis, or the rank is outside the world.
    """
    if not 0 <= rank < parallel.world_size:
        raise TopologyError(f"rank {rank} is outside the world of {parallel.world_size} ranks (0 to {parallel.world_size - 1})")
    for ranks in axis_groups(parallel, axis):
        if rank in ranks:
            return AxisGroup(axis, ranks, ranks.index(rank))
    raise TopologyError(f"rank {rank} is in no {axis} group of {parallel}")
