"""Rejection sampling in a step: from sampled rows to what ``rejection`` decides on, and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..batch_state import BatchState, I32Array, I64Array
from ..sampler import Sampler
from .proposer import Proposer
from .rejection import probabilities, verify_by_rejection
from .verification import Verdict


def reject_drafts(
    verdict: Verdict, sampler: Sampler, logits: Tensor, state: BatchState, places: I64Array, sampled: I32Array, proposer: Proposer
) -> tuple[Verdict, I32Array]:
    """Judge again, by rejection sampling, the drafts of sequences that have a temperature.

    Args:
        verdict: by comparison; it stands for sequences without temperature or without drafts.
        sampler: all ranks that share its vocabulary must call this.
        logits: float32 [R, W] of the sampled rows.
        places: int64 [R], of the sampled rows.
        sampled: int32 [R].
        proposer: of the drafts.

    Returns:
        The verdict, and int32 [R], of which its ``kept_rows`` are the sequences' next tokens.
    """
    judged = np.flatnonzero(state.sampling["is_random"][verdict.slots] & (verdict.num_drafts > 0))
    if not len(judged):
        return verdict, sampled
    slots, num_drafts, firsts = verdict.slots[judged], verdict.num_drafts[judged], verdict.firsts[judged]
    rows = _ranges(firsts, num_drafts + 1)
    draft_rows = _ranges(firsts, num_drafts)
    drafts = state.tokens[np.repeat(slots, num_drafts), places[draft_rows]]
    scores = sampler.filtered_scores(
        logits.index_select(0, torch.from_numpy(rows).to(logits.device)), state, np.repeat(slots, num_drafts + 1), places[rows]
    )
    seeds = state.sampling["seed"][slots]
    accepted, next_tokens = verify_by_rejection(
        probabilities(scores), proposer.draft_probabilities(slots), drafts, num_drafts, seeds, places[firsts]
    )
    num_accepted, all_next, token_ids = verdict.num_accepted.copy(), verdict.next_tokens.copy(), sampled.copy()
    num_accepted[judged], all_next[judged] = accepted, next_tokens
    token_ids[draft_rows] = drafts
    token_ids[firsts + accepted] = next_tokens
    return replace(verdict, num_accepted=num_accepted, next_tokens=all_next), token_ids


def _ranges(starts: I64Array, counts: I64Array) -> I64Array:
    """Return the numbers from each start on, as many as its count, one range after another."""
    before = np.cumsum(counts) - counts
    ranges: I64Array = np.arange(counts.sum()) + np.repeat(starts - before, counts)
    return ranges
