"""Verification by comparison: a draft is kept if it is what would have been sampled in its place.

    tokens   | known ..... | d1  d2  d3 |          the target computes all at once, and samples behind the last known one and each draft
    sampled                  t1  t2  t3  t4        t1 = d1 and t2 = d2, t3 is another: t1, t2 and t3 are the sequence's next tokens

Noise depends on seed, place and token only, so that these are the tokens that sampling one at a time gives, whoever proposed what. A
draft that is drawn with the same noise from nearly the same distribution is often the same token (drafter-invariant speculation,
arXiv 2408.07978).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..batch_state import BatchState, I32Array, I64Array


@dataclass(frozen=True)
class Verdict:
    """What became of the drafts of N sequences.

    Args:
        slots: int64 [N].
        firsts: int64 [N], each one's first row among the R that were sampled; a sequence has a row for each draft and one more.
        num_drafts, num_accepted: int64 [N].
        next_tokens: int32 [N], the one behind the accepted drafts.
    """

    slots: I64Array
    firsts: I64Array
    num_drafts: I64Array
    num_accepted: I64Array
    next_tokens: I32Array

    def kept_rows(self) -> npt.NDArray[np.int64]:
        """Return the rows, int64 [tokens], that are the sequences' next tokens: of each one the accepted ones and the one behind."""
        counts = self.num_accepted + 1
        before = np.cumsum(counts) - counts
        rows: npt.NDArray[np.int64] = np.arange(counts.sum()) + np.repeat(self.firsts - before, counts)
        return rows


def without_drafts(slots: I64Array, sampled: I32Array) -> Verdict:
    """Return the verdict on N sequences without drafts, int64 [N], of which each has one row, int32 [N]."""
    none = np.zeros(len(slots), np.int64)
    return Verdict(slots, np.arange(len(slots)), none, none, sampled)


def verify_by_match(state: BatchState, slots: I64Array, places: I64Array, sampled: I32Array, num_drafts: I64Array) -> Verdict:
    """Return how many drafts of each sequence equal what was sampled in their places.

    Args:
        state: with the drafts.
        slots, places: int64 [R], of the sampled rows, sequence by sequence.
        sampled: int32 [R].
        num_drafts: int64 [N].
    """
    ends = np.cumsum(num_drafts + 1)
    firsts = ends - num_drafts - 1
    differs = sampled != state.tokens[slots, places]
    differs[ends - 1] = True  # there is no draft to compare with
    first_differing = np.flatnonzero(differs)
    stops = first_differing[np.searchsorted(first_differing, firsts)]
    return Verdict(slots[firsts], firsts, num_drafts, stops - firsts, sampled[stops])
