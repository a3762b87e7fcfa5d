"""What proposes drafts: tokens behind the known ones of each sequence, of which the target keeps those that it agrees with.

Every rank runs the proposers on the same state in the same order, so that all propose alike and nobody tells anybody. Proposers nest: one
that has a model is itself sped up by another, whose proposals it verifies as the target verifies its own.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...transport.batch import BatchStep
from ..batch_state import BatchState, I64Array


class Proposer(Protocol):
    """Proposes tokens; deterministic, and the same on all ranks."""

    def follow(self, step: BatchStep, state: BatchState) -> None:
        """Take note of sequences that join or leave and of blocks that change hands; ``state`` has applied ``step``."""

    def propose(self, state: BatchState, slots: I64Array, lengths: I64Array, most: I64Array) -> I64Array:
        """Write drafts into ``state.tokens`` behind each sequence's first ``lengths`` tokens, and return their numbers, int64 [D].

        Args:
            slots: int64 [D], no slot twice; D is at least 1.
            lengths: int64 [D], tokens to go on from; at least as many as are known of each.
            most: int64 [D], drafts that there is room for; 0 or more.
        """

    def settle(self, slots: I64Array, lengths: I64Array) -> None:
        """Learn which drafts were kept: the first ``lengths`` tokens of each slot stand, the last of them newly sampled."""

    def draft_probabilities(self, slots: I64Array) -> Tensor | None:
        """Return float64 [N, V], what the last drafts of ``slots`` were drawn from, in order; None where no chance was in them."""
