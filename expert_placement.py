"""Which expert of a mixture layer each copy is of, and how copies are chosen so that ranks have equal work. Standard library only.

A layer of E experts has E + R copies of them, R redundant ones among these. A placement names the expert of each copy; ranks have the
copies one after another, as ``place_experts`` shares them out:

    7 experts, 1 redundant, 2 ranks     copies    0 1 2 3 | 4 5 6 7
                                        of        0 1 2 3 | 4 5 6 0

The driver makes placements, the ranks follow them. Each layer has one of its own.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

from .config import ParallelConfig
from .errors import ConfigError
from .mixture_config import MixtureConfig, place_experts

Placement = tuple[int, ...]
"""The expert of each copy."""

_MIN_GAIN = 0.02  # of the busiest rank's work, below which a layer stays as it is: moving weights is not for nothing


def first_placement(num_experts: int, num_redundant: int) -> Placement:
    """Return each expert once, then the redundant copies: the first experts again."""
    return tuple(copy % num_experts for copy in range(num_experts + num_redundant))


def num_expert_ranks(parallel: ParallelConfig) -> int:
    """Return over how many ranks a layer's experts are spread: those that share them, or the tp ranks of a replica."""
    return max(parallel.ep, parallel.tp)


def check_redundant_experts(mixture: MixtureConfig | None, num_redundant: int, parallel: ParallelConfig) -> None:
    """Check that there are experts to copy, and that no rank needs two copies of one.

    Raises:
        ConfigError: more redundant copies than that leaves; says how many are possible.
    """
    if mixture is None and num_redundant:
        raise ConfigError(f"redundant_experts is {num_redundant}, and the model has no experts: leave it out")
    num_ranks = num_expert_ranks(parallel)
    most = 0 if mixture is None else mixture.num_experts * (num_ranks - 1)
    if num_redundant > most:
        raise ConfigError(
            f"redundant_experts is {num_redundant}; the experts of a layer are spread over {num_ranks} ranks, of which none has use for a "
            f"second copy of one: {f'choose at most {most}' if most else 'leave it out'}"
        )


def check_movable(mixture: MixtureConfig | None, parallel: ParallelConfig) -> None:
    """Check that there are experts that can be on one rank or on another.

    Raises:
        ConfigError: there are none, or one rank has all of them.
    """
    if mixture is None:
        raise ConfigError("there is nothing to rebalance: the model has no experts")
    if num_expert_ranks(parallel) == 1:
        raise ConfigError("there is nothing to rebalance: each replica has all experts on one rank; spread them with tp or ep")


def check_placement(placement: Sequence[int], num_experts: int, num_copies: int) -> Placement:
    """Return what has come over the wire as a placement.

    Raises:
        ConfigError: another number of copies, or they are not of all experts, each at least once.
    """
    if len(placement) != num_copies or set(placement) != set(range(num_experts)):
        raise ConfigError(f"a placement of {len(placement)} copies; it must have {num_copies}, of {num_experts} experts each at least once")
    return tuple(placement)


def copies_of_rank(placement: Placement, rank: int, num_ranks: int) -> Placement:
    """Return the experts that a rank has, in the order of its copies."""
    span = place_experts(len(placement), rank, num_ranks)
    return placement[span.start : span.stop]


def loads_of_ranks(placement: Placement, loads: Sequence[int], num_ranks: int) -> list[float]:
    """Return each rank's work where an expert's ``loads`` are shared out evenly among its copies."""
    num_copies = Counter(placement)
    of_ranks = (copies_of_rank(placement, rank, num_ranks) for rank in range(num_ranks))
    return [sum(loads[expert] / num_copies[expert] for expert in experts) for experts in of_ranks]


def balance_experts(placement: Placement, loads: Sequence[int], num_ranks: int) -> Placement:
    """Return a placement by which the ranks have as equal work as a greedy choice finds, or ``placement`` where it is no better.

    The experts with the most work a copy get the redundant copies, one at a time; then copies go to ranks, the heaviest first, each to
    the rank with the least work. An expert that stays on a rank keeps its copy's number there, so that only the others are moved.

    Args:
        placement: the present one.
        loads: tokens of each expert.
    """
    held = _fill_ranks(placement, loads, num_ranks)
    found: list[int] = []
    for rank, experts in enumerate(held):
        found += _keep_in_place(copies_of_rank(placement, rank, num_ranks), experts)
    balanced, busiest = tuple(found), max(loads_of_ranks(placement, loads, num_ranks))
    is_better = max(loads_of_ranks(balanced, loads, num_ranks)) < (1 - _MIN_GAIN) * busiest
    return balanced if is_better else placement


def _count_copies(loads: Sequence[int], num_copies: int, num_ranks: int) -> list[int]:
    """Return how many copies each expert gets, at most one a rank."""
    counts = [1] * len(loads)
    heap = [(-float(load), expert) for expert, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(num_copies - len(loads)):
        while counts[heap[0][1]] == num_ranks:
            heapq.heappop(heap)
        expert = heap[0][1]
        counts[expert] += 1
        heapq.heapreplace(heap, (-loads[expert] / counts[expert], expert))
    return counts


def _fill_ranks(placement: Placement, loads: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return each rank's experts, as many as it has copies."""
    counts = _count_copies(loads, len(placement), num_ranks)
    room = [len(place_experts(len(placement), rank, num_ranks)) for rank in range(num_ranks)]
    before = [set(copies_of_rank(placement, rank, num_ranks)) for rank in range(num_ranks)]
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    work = [0.0] * num_ranks
    for expert in sorted(range(len(loads)), key=lambda expert: (-loads[expert] / counts[expert], expert)):
        for _ in range(counts[expert]):
            free = [rank for rank in range(num_ranks) if room[rank] > len(held[rank])]
            # a second copy on one rank is of no use, but where no other rank has room it does no harm
            rank = min(free, key=lambda rank: (expert in held[rank], work[rank], expert not in before[rank], rank))
            held[rank].append(expert)
            work[rank] += loads[expert] / counts[expert]
    return held


def _keep_in_place(before: Sequence[int], experts: Sequence[int]) -> list[int]:
    """Return ``experts`` in an order that leaves those of ``before`` where they were."""
    left = Counter(experts)
    kept: list[int | None] = []
    for expert in before:
        stays = left[expert] > 0
        left[expert] -= stays
        kept.append(expert if stays else None)
    new = iter(left.elements())
    return [next(new) if expert is None else expert for expert in kept]
