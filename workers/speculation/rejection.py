"""Verification that keeps the target's distribution, whatever proposed the drafts: classic rejection sampling.

With p the target's and q the draft's distribution at a position, and d drawn from q:

    accept d if u q(d) < p(d), u uniform: with probability min(1, p(d) / q(d));
    at the first rejection the token comes from max(p - q, 0), normalised: what q has offered too little of;
    after the last draft, all accepted, one more comes from p.

A position's token is then distributed as p: min(p, q) comes from accepted drafts, p - min(p, q) from rejections. The expected share of
accepted drafts is the sum over tokens of min(p, q). p and q are what is sampled from, after penalties, temperature and filters; a wrong q
bends the result. The draws hash seed, position and stream (see ``gumbel``), so that all ranks decide alike.

Sources: Leviathan, Kalman and Matias, arXiv 2211.17192; Chen et al., arXiv 2302.01318.
Shapes: D sequences, N drafts of them all, R = D + N rows of the target, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import InternalError
from ..batch_state import I32Array, I64Array
from ..gumbel import Stream, gumbel_noise, row_keys, uniforms


def probabilities(scores: Tensor) -> Tensor:
    """Return the distribution, float64 [R, V], that Gumbel noise on these scores samples from.

    Args:
        scores: [R, V], over temperature; -inf for tokens that a filter took.
    """
    return scores.softmax(dim=-1, dtype=torch.float64)


def verify_by_rejection(
    target_probs: Tensor,
    draft_probs: Tensor | None,
    drafts: I32Array,
    num_drafts: I64Array,
    seeds: npt.NDArray[np.uint64],
    places: I64Array,
) -> tuple[I64Array, I32Array]:
    """Return how many drafts of each sequence are accepted, int64 [D], and the token that follows them, int32 [D].

    The drafts must not depend on streams ACCEPT, RESIDUAL and SAMPLE of these seeds at these places.

    Args:
        target_probs: float64 [R, V]; a sequence has a row for each of its drafts, in order, and then the row after its last draft.
        draft_probs: float64 [N, V], what each draft was drawn from; None for a proposer without chance, which is certain of its drafts.
        drafts: int32 [N], sequence by sequence.
        num_drafts: int64 [D], 0 or more of each sequence.
        seeds: uint64 [D], below 2**63.
        places: int64 [D], index in its sequence of the first token that is decided here.

    Raises:
        InternalError: a probability that decides is not a number.
    """
    num_rows, vocab_size = target_probs.shape
    assert len(drafts) == num_drafts.sum(), (len(drafts), num_drafts)
    assert num_rows == len(drafts) + len(num_drafts), (num_rows, len(drafts), len(num_drafts))
    assert draft_probs is None or draft_probs.shape == (len(drafts), vocab_size), (draft_probs.shape, len(drafts), vocab_size)
    first_drafts = np.cumsum(num_drafts) - num_drafts
    owners = np.repeat(np.arange(len(num_drafts)), num_drafts)  # [N], the sequence of each draft
    offsets = np.arange(len(drafts)) - first_drafts[owners]
    p = _pick(target_probs, np.arange(len(drafts)) + owners, drafts)  # before a draft's row stand an extra one of each earlier sequence
    q = np.ones(len(drafts)) if draft_probs is None else _pick(draft_probs, np.arange(len(drafts)), drafts)
    is_accepted = _accepts(p, q, uniforms(seeds[owners], places[owners] + offsets, Stream.ACCEPT))
    num_accepted = num_drafts.copy()
    np.minimum.at(num_accepted, owners[~is_accepted], offsets[~is_accepted])

    weights = _take(target_probs, first_drafts + np.arange(len(num_drafts)) + num_accepted)  # [D, V], a copy
    rejected = np.flatnonzero(num_accepted < num_drafts)
    if len(rejected):
        refused = first_drafts[rejected] + num_accepted[rejected]
        q_rows = _one_hot(drafts[refused], target_probs) if draft_probs is None else _take(draft_probs, refused)
        rows = torch.from_numpy(rejected).to(weights.device)
        weights[rows] = _residual(weights[rows], q_rows)
    keys = row_keys(seeds, places + num_accepted, Stream.SAMPLE)
    keys[rejected] = row_keys(seeds[rejected], places[rejected] + num_accepted[rejected], Stream.RESIDUAL)
    return num_accepted, _draw(weights, keys)


def _accepts(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64], u: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return bool [N]. "Less" and not "at most", so that a token that the target cannot sample is refused whatever q says of it."""
    return u * q < p


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """Return max(p - q, 0), not normalised, float64 [r, V]; p where nothing is left of it."""
    left = (p - q).clamp_(min=0)
    # A rejection with p = q takes a u within a rounding error of 1. Then either is right, and zeros would have no sample.
    return torch.where(left.sum(dim=-1, keepdim=True) == 0, p, left)  # NaN stays


def _draw(weights: Tensor, keys: npt.NDArray[np.int32]) -> I32Array:
    """Return a token of each row, drawn in proportion to its weights: [D, V], overwritten."""
    token_ids = torch.arange(weights.shape[1], dtype=torch.int32, device=weights.device)
    scores = weights.log_().add_(gumbel_noise(torch.from_numpy(keys).to(weights.device)[:, None], token_ids))
    best, tokens = scores.max(dim=-1)  # NaN wins, so that it is seen here
    is_finite = best.isfinite().cpu().numpy()
    if not is_finite.all():
        raise InternalError(
            f"sequence {is_finite.argmin()} of the {len(is_finite)} that are verified has probabilities that are no numbers, or only "
            "zeros: check both checkpoints for NaN, and if dtype is float16, which overflows at 65,504, use bfloat16 or float32"
        )
    drawn: I32Array = tokens.cpu().numpy().astype(np.int32)
    return drawn


def _one_hot(tokens: I32Array, like: Tensor) -> Tensor:
    rows = torch.zeros(len(tokens), like.shape[1], dtype=like.dtype, device=like.device)
    return rows.scatter_(1, torch.from_numpy(tokens.astype(np.int64)).to(like.device)[:, None], 1.0)


def _pick(table: Tensor, rows: I64Array, columns: I32Array) -> npt.NDArray[np.float64]:
    device = table.device
    values: npt.NDArray[np.float64] = table[torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)].cpu().numpy()
    return values


def _take(table: Tensor, rows: I64Array) -> Tensor:
    return table.index_select(0, torch.from_numpy(rows).to(table.device))
