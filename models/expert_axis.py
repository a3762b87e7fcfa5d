"""The ranks that a mixture's experts are spread over: those of one replica, or of several data-parallel replicas together.

Within one replica all ranks have the same tokens, and nothing is exchanged. Over replicas an ``Exchange`` has tokens meet the experts:
``expert_gather`` brings every token to every rank, ``expert_all_to_all`` each to the ranks that have its experts. Each replica takes part
in every step, with no tokens if it has none: how many the others have is known from the step, so that nobody asks.

T tokens, D model, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from ..expert_placement import Placement, first_placement
from .communicator import Communicator

Route = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(x [T, D], place of the first of them in the step) -> weights float32 [T, k], copies int64 [T, k]."""

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [T, D], weights [T, k], copies [T, k]) -> what this rank's experts add, [T, D]."""


class Exchange(Protocol):
    """A way for tokens of several replicas to meet the experts that these share."""

    @property
    def rank(self) -> int:
        """This rank's place among those that the experts are spread over."""

    @property
    def size(self) -> int:
        """How many these are."""

    def run(self, x: Tensor, counts: Sequence[int], route: Route, compute: Compute) -> Tensor:
        """Return parts [T, D] that, summed over the tensor-parallel ranks, are what all experts add to ``x`` [T, D].

        Args:
            counts: the most tokens that each replica can have in this step; at least one of them is not 0.
        """


class ChosenExchange:
    """One of two exchanges over the same ranks, chosen anew in each step by the numbers of its tokens, which all ranks know.

    Args:
        is_second: by these numbers.
    """

    def __init__(self, first: Exchange, second: Exchange, is_second: Callable[[Sequence[int]], bool]) -> None:
        self._first = first
        self._second = second
        self._is_second = is_second
        self.rank = first.rank
        self.size = first.size

    def run(self, x: Tensor, counts: Sequence[int], route: Route, compute: Compute) -> Tensor:
        """As the one that is chosen."""
        exchange = self._second if self._is_second(counts) else self._first
        return exchange.run(x, counts, route, compute)


class ExpertAxis:
    """A rank's place among those that share the experts.

    Args:
        communicator: the tensor-parallel axis.
        exchange: where the experts are spread over several replicas; None where each replica has all of them.
        num_redundant: copies of experts in a layer beyond one of each.
        placements: by layer, where it is not ``first_placement``.
        replicas: those that share the experts with this one, where these are not all.
    """

    def __init__(
        self,
        communicator: Communicator,
        exchange: Exchange | None = None,
        *,
        num_redundant: int = 0,
        placements: Mapping[int, Placement] | None = None,
        replicas: slice = slice(None),
    ) -> None:
        self._exchange = exchange
        self._counts: Sequence[int] = ()
        self._num_redundant = num_redundant
        self._placements = dict(placements or {})
        self._replicas = replicas
        self.rank = communicator.rank if exchange is None else exchange.rank
        self.size = communicator.size if exchange is None else exchange.size

    @property
    def is_lockstep(self) -> bool:
        """Whether replicas need each other in every step."""
        return self._exchange is not None

    def placement(self, layer: int, num_experts: int) -> Placement:
        """Return the placement that a layer begins with."""
        return self._placements.get(layer) or first_placement(num_experts, self._num_redundant)

    def begin_step(self, counts: Sequence[int]) -> None:
        """Say how many tokens each replica computes at most in the step that begins; at least one of them is not 0."""
        self._counts = counts[self._replicas]

    def run(self, x: Tensor, route: Route, compute: Compute) -> Tensor:
        """Return parts [T, D] that, summed over the tensor-parallel ranks, are what all experts add to ``x`` [T, D]."""
        if self._exchange is None:
            return compute(x, *route(x, 0))
        if not any(self._counts):  # the work is with replicas that have experts of their own
            return x
        return self._exchange.run(x, self._counts, route, compute)
