"""From the batch state to the tensors of one forward pass.

Built with NumPy for the whole batch at once; only chunks, of which a step has few, are looped over.
Shapes: T tokens of the step, R sampled rows, D decode rows, Q tokens of the longest of these, B blocks of a context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..models.attention import AttentionInputs, ChunkSpan, RowSpread
from .batch_state import BatchState, I64Array, StepRows


@dataclass(frozen=True)
class StepInputs:
    """What a model is run on in one step.

    Args:
        token_ids: int64 [T] on the device, packed: the chunks in order, then the decode rows.
        attention: where these tokens lie in the KV cache.
        sampled_rows: int64 [R] on the device, rows of the T that end what is known of their sequence, or are drafts behind that.
        sampled_slots: int64 [R], the slots of those sequences.
        sampled_places: int64 [R], the index in its sequence of the token that is sampled.
    """

    token_ids: Tensor
    attention: AttentionInputs
    sampled_rows: Tensor
    sampled_slots: I64Array
    sampled_places: I64Array


def build_inputs(state: BatchState, rows: StepRows, device: torch.device, num_known: I64Array | None = None) -> StepInputs:
    """Return the inputs of one step.

    Args:
        state: with the tokens of ``rows``, drafts included.
        rows: from ``state.apply`` of that step, or like these.
        device: of the tensors.
        num_known: int64 [S], how many tokens of each slot count as known; None takes those of ``state``.
    """
    ends = rows.ends
    offsets = np.cumsum(rows.num_tokens)  # [N], the packed row after each sequence's last
    token_slots, positions = _expand(rows, offsets)
    block_indices, places = np.divmod(positions, state.block_size)
    longest = int(ends.max(initial=0))
    sampled_places = positions + 1
    is_sampled = sampled_places >= (state.num_tokens if num_known is None else num_known)[token_slots]
    is_decode = slice(rows.num_chunks, None)
    attention = AttentionInputs(
        block_size=state.block_size,
        positions=_to_device(positions, device),
        max_length=longest,
        write_blocks=_to_device(state.block_table[token_slots, block_indices], device),
        write_places=_to_device(places, device),
        chunks=_build_chunks(state, rows, offsets, device),
        decode_start=int(offsets[rows.num_chunks - 1]) if rows.num_chunks else 0,
        decode_blocks=_to_device(_decode_blocks(state, rows, ends[is_decode]), device),
        decode_lengths=_to_device(rows.starts[is_decode] + 1, device),
        decode_spread=None if token_slots is rows.slots else _build_spread(rows.num_tokens[is_decode], device),
        repeats_decodes=rows.repeats_decodes,
    )
    return StepInputs(
        token_ids=_to_device(state.tokens[token_slots, positions].astype(np.int64), device),
        attention=attention,
        sampled_rows=_to_device(np.flatnonzero(is_sampled), device),
        sampled_slots=token_slots[is_sampled],
        sampled_places=sampled_places[is_sampled],
    )


def _expand(rows: StepRows, offsets: I64Array) -> tuple[I64Array, I64Array]:
    """Return the slot and the position of each token, int64 [T]."""
    total = int(offsets[-1]) if len(offsets) else 0
    if total == len(rows.slots):  # the usual step: a row is a token
        return rows.slots, rows.starts
    return np.repeat(rows.slots, rows.num_tokens), np.arange(total) + np.repeat(rows.starts + rows.num_tokens - offsets, rows.num_tokens)


def _build_chunks(state: BatchState, rows: StepRows, offsets: I64Array, device: torch.device) -> tuple[ChunkSpan, ...]:
    spans = []
    for i in range(rows.num_chunks):
        count, context = int(rows.num_tokens[i]), int(rows.ends[i])
        blocks = state.block_table[rows.slots[i], : -(-context // state.block_size)]
        # A copy: the table changes while a device may still be reading.
        spans.append(ChunkSpan(int(offsets[i]) - count, count, context, _to_device(blocks.copy(), device)))
    return tuple(spans)


def _build_spread(num_tokens: I64Array, device: torch.device) -> RowSpread | None:
    """Return how decode rows of so many tokens each lie in a rectangle, None where all have one."""
    width = int(num_tokens.max(initial=1))
    if width == 1:
        return None
    columns = np.arange(width)
    firsts = np.cumsum(num_tokens) - num_tokens
    is_token = columns < num_tokens[:, None]
    sources = firsts[:, None] + np.minimum(columns, num_tokens[:, None] - 1)  # a row's last token pads it
    return RowSpread(width, _to_device(sources, device), _to_device(np.flatnonzero(is_token), device))


def _decode_blocks(state: BatchState, rows: StepRows, lengths: I64Array) -> I64Array:
    """Return int64 [D, B], the blocks of each row's context; B is that of the longest one."""
    width = -(-int(lengths.max(initial=0)) // state.block_size)
    blocks: I64Array = state.block_table[rows.slots[rows.num_chunks :], :width]
    return blocks


def _to_device(array: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
