"""Changes to logits that depend on a sequence's history: penalties, and no end before ``min_tokens``.

Repetition divides positive logits, and multiplies negative ones, of every token in prompt or output (CTRL, arXiv 1909.05858). Presence
and frequency are subtracted for tokens of the output, once and per occurrence (as in OpenAI's API). They apply in this order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .batch_state import BatchState, I64Array

_Entries = tuple[npt.NDArray[np.generic], ...]


def apply_penalties(logits: Tensor, state: BatchState, slots: I64Array, places: I64Array, vocab_start: int) -> Tensor:
    """Return the logits with each row's penalties and ``min_tokens`` mask applied.

    Needs no other rank: each knows all tokens, and changes the columns that it has. The work grows with the history of the rows that
    ask for penalties, and is nothing when none does.

    Args:
        logits: float32 [R, W], columns ``vocab_start`` to ``vocab_start + W - 1`` of the vocabulary; never written to.
        slots: int64 [R], the slot of each row.
        places: int64 [R], how many tokens of it stand before the one that is sampled.

    Returns:
        float32 [R, W]; ``logits`` itself when no row asks for a change.
    """
    if not state.sampling["is_changed"][slots].any():
        return logits
    params = state.sampling[slots]
    is_penalised = (params["repetition_penalty"] != 1) | (params["presence_penalty"] != 0) | (params["frequency_penalty"] != 0)
    is_early = places - state.num_prompt[slots] < params["min_tokens"]
    penalised, early = np.flatnonzero(is_penalised), np.flatnonzero(is_early)
    if not len(penalised) and not len(early):
        return logits
    logits = logits.clone()
    if len(penalised):
        width = logits.shape[1]
        rows = zip(penalised.tolist(), slots[penalised].tolist(), places[penalised].tolist())
        _penalise(logits, [_history_entries(state, slot, place, row, vocab_start, width) for row, slot, place in rows])
    if len(early):
        _forbid(logits, [_end_entries(state, int(slots[row]), row, vocab_start, logits.shape[1]) for row in early.tolist()])
    return logits


def _history_entries(state: BatchState, slot: int, place: int, row: int, vocab_start: int, width: int) -> _Entries:
    """Return rows, columns, divisors and subtrahends of the tokens before ``place``, as far as this shard has them."""
    history, num_prompt = state.tokens[slot, :place], int(state.num_prompt[slot])
    ids, index_of = np.unique(history, return_inverse=True)
    counts = np.bincount(index_of[num_prompt:], minlength=len(ids))  # occurrences in the output
    params = state.sampling[slot]
    subtract = params["presence_penalty"] * (counts > 0) + params["frequency_penalty"] * counts
    columns = ids.astype(np.int64) - vocab_start
    is_here = (columns >= 0) & (columns < width)
    columns, subtract = columns[is_here], subtract[is_here]
    return np.full(len(columns), row), columns, np.full(len(columns), params["repetition_penalty"], np.float32), subtract.astype(np.float32)


def _end_entries(state: BatchState, slot: int, row: int, vocab_start: int, width: int) -> _Entries:
    columns = state.end_token_ids[slot].astype(np.int64) - vocab_start
    columns = columns[(columns >= 0) & (columns < width)]
    return np.full(len(columns), row), columns


def _penalise(logits: Tensor, entries: list[_Entries]) -> None:
    rows, columns, divisors, subtract = _join(entries, logits.device)
    values = logits[rows, columns]
    values = torch.where(values > 0, values / divisors, values * divisors)
    logits[rows, columns] = values - subtract


def _forbid(logits: Tensor, entries: list[_Entries]) -> None:
    rows, columns = _join(entries, logits.device)
    logits[rows, columns] = -torch.inf


def _join(entries: list[_Entries], device: torch.device) -> list[Tensor]:
    """Return each kind of entry for all rows in one tensor, so that the device does one operation a kind, not one a row."""
    return [torch.from_numpy(np.concatenate(kind)).to(device) for kind in zip(*entries)]
