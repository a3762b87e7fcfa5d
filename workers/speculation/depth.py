"""How many tokens are proposed for each sequence in a step: policies that every rank evaluates for itself.

A policy sees what all ranks see: the number of sequences that decode, what was accepted, and costs that came in the step stream. It reads
no clock and draws no chance, so that all ranks choose alike without a word to each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from ...speculation_config import SpeculationConfig
from ...transport.step_cost import StepCost
from .acceptance import I64Array
from .goodput import GoodputDepth


class DepthPolicy(Protocol):
    """Chooses K, the tokens proposed for each sequence of a step, 0 included."""

    def choose(self, num_sequences: int) -> int:
        """Return K for a step in which so many sequences decode, at least 1; called exactly once for each such step, in order."""
        ...

    def observe(self, num_accepted: I64Array, *, depths: int | I64Array) -> None:
        """Learn what was accepted in an earlier step, or in several.

        Args:
            num_accepted: int64 [D], of each sequence the drafts that were accepted; 0 also where nothing was proposed for it.
            depths: the K that was chosen for the step, not what was proposed; int64 [D] where sequences come from different steps.
        """
        ...

    def take_costs(self, costs: Iterable[StepCost]) -> None:
        """Learn what steps take, measured and published by the driver; raises BadFrameError for a depth beyond the largest."""
        ...


class FixedDepth:
    """Always the same depth."""

    def __init__(self, k: int) -> None:
        self._k = k

    def choose(self, num_sequences: int) -> int:
        return self._k

    def observe(self, num_accepted: I64Array, *, depths: int | I64Array) -> None:
        pass

    def take_costs(self, costs: Iterable[StepCost]) -> None:
        pass


class DepthByBatch:
    """A depth for each size of batch.

    Args:
        depths: (largest number of sequences, K), in rising order; more sequences than the last get no drafts.
    """

    def __init__(self, depths: Sequence[tuple[int, int]]) -> None:
        self._depths = tuple(depths)

    def choose(self, num_sequences: int) -> int:
        return next((depth for limit, depth in self._depths if num_sequences <= limit), 0)

    def observe(self, num_accepted: I64Array, *, depths: int | I64Array) -> None:
        pass

    def take_costs(self, costs: Iterable[StepCost]) -> None:
        pass


def build_depth_policy(config: SpeculationConfig) -> DepthPolicy:
    """Return the policy that the configuration names; no depth it chooses is above ``config.k``."""
    if config.policy == "fixed":
        return FixedDepth(config.k)
    if config.policy == "batch":
        return DepthByBatch(config.depths)
    return GoodputDepth(config.k)
