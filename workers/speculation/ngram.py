"""Proposals from the sequence itself: what followed the last time that its newest tokens stood there (prompt lookup).

    history   ... a b c x y z ... a b c          the longest suffix that occurs earlier: a b c, proposed: x y z ...

No state, no model and no chance: the proposals are a function of the history alone, the same on every rank. The search compares the
whole history with the suffix, one token of it after another: at most ``max_n`` passes, whatever stands in the history. ``bytes.rfind``
is faster in repetitive texts, but a hit may begin within a token, and a text of such hits took it a hundred times as long (docs/log.md).

Source: Saxena, "Prompt lookup decoding", 2023.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...transport.batch import BatchStep
from ..batch_state import BatchState, I32Array, I64Array


class NgramProposer:
    """Proposes the continuation of the latest earlier occurrence of the longest suffix that has one.

    Args:
        k: most tokens proposed at once, at least 1.
        min_n, max_n: suffix lengths that count as an occurrence, 1 <= min_n <= max_n.
    """

    def __init__(self, k: int, min_n: int, max_n: int) -> None:
        self.k = k
        self._min_n = min_n
        self._max_n = max_n

    def follow(self, step: BatchStep, state: BatchState) -> None:
        """Nothing to take note of."""

    def settle(self, slots: I64Array, lengths: I64Array) -> None:
        """Nothing to take note of."""

    def draft_probabilities(self, slots: I64Array) -> Tensor | None:
        """Return None: there is no chance in it."""
        return None

    def propose(self, state: BatchState, slots: I64Array, lengths: I64Array, most: I64Array) -> I64Array:
        """Propose for each sequence, as ``Proposer`` asks; none where none of its last tokens have stood before."""
        counts = np.zeros(len(slots), np.int64)
        for row, (slot, length, room) in enumerate(zip(slots.tolist(), lengths.tolist(), most.tolist())):
            drafts = self.propose_one(state.tokens[slot, :length], room)
            counts[row] = len(drafts)
            state.tokens[slot, length : length + len(drafts)] = drafts
        return counts

    def propose_one(self, history: I32Array, most: int) -> I32Array:
        """Return up to ``min(k, most)`` tokens to follow ``history``, a view of it; none where no suffix occurs earlier.

        An occurrence may overlap the suffix. The proposal ends where the history does, and so may be shorter.

        Args:
            history: int32 [n], all known tokens of a sequence; n may be 0.
            most: tokens that there is room for, 0 or more.
        """
        count = min(self.k, most)
        start = self._find_continuation(history) if count else len(history)
        return history[start : start + count]

    def _find_continuation(self, history: I32Array) -> int:
        """Return the index after the occurrence, or the history's length for none."""
        last = len(history) - 1
        if last < self._min_n:
            return len(history)
        starts = history[:last] == history[last]  # bool: whether the suffix of the length looked at occurs from here
        length = 1
        while length < min(self._max_n, last):
            longer = starts[1:] & (history[: last - length] == history[last - length])
            if not longer.any():
                break
            starts, length = longer, length + 1
        if length < self._min_n or not starts.any():
            return len(history)
        return last - int(starts[::-1].argmax())
