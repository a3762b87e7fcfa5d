"""Ranks on mesh axes: pure arithmetic, no processes.

Ranks are laid out as ``arange(world_size).reshape(dp, pp, tp)``: tp varies fastest, so that its ranks are neighbours on a node.
The expert axis ``ep`` spans the ranks of one pipeline stage over dp and tp.

    world 8 = dp 2 x pp 2 x tp 2            tp groups: 01 23 45 67
        dp 0: pp 0: 0 1   pp 1: 2 3         pp groups: 02 13 46 57
        dp 1: pp 0: 4 5   pp 1: 6 7         dp groups: 04 15 26 37    ep groups (ep 4): 0145 2367
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
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


def stage_layers(num_layers: int, num_stages: int, partition: Sequence[int] | None = None) -> list[range]:
    """Return the layers of each pipeline stage, contiguous and in order.

    Args:
        partition: layers of each stage; None balances them, the first stages having one more where they cannot be equal, since the last
            has the head as well.

    Raises:
        TopologyError: more stages than layers, or a partition that does not give each stage one layer at least and all of them together.
    """
    if partition is None:
        if num_stages > num_layers:
            raise TopologyError(f"pp {num_stages} is more than the {num_layers} layers of the model; choose at most {num_layers}")
        each, rest = divmod(num_layers, num_stages)
        partition = [each + (stage < rest) for stage in range(num_stages)]
    if len(partition) != num_stages or sum(partition) != num_layers or min(partition) < 1:
        raise TopologyError(
            f"the pipeline partition {', '.join(map(str, partition))} has {len(partition)} stages and {sum(partition)} layers; "
            f"it must give each of pp {num_stages} stages one layer or more, {num_layers} in all"
        )
    ends = list(itertools.accumulate(partition))
    return [range(end - count, end) for end, count in zip(ends, partition)]


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
