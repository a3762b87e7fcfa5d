"""From the batch state to the tensors of one forward pass.

Built with NumPy for the whole batch at once; only chunks, of which a step has few, are looped over.
Shapes: T tokens of the step, R sampled rows, D decode rows, B blocks of a context.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..models.attention import AttentionInputs, ChunkSpan
from .batch_state import BatchState, I64Array, StepRows


@dataclass(frozen=True)
class StepInputs:
    """What a model is run on in one step.

    Args:
        token_ids: int64 [T] on the device, packed: the chunks in order, then one token a decode row.
        attention: where these tokens lie in the KV cache.
        sampled_rows: int64 [R] on the device, rows of the T that end what is known of their sequence.
        sampled_slots: int64 [R], the slots of those sequences.
    """

    token_ids: Tensor
    attention: AttentionInputs
    sampled_rows: Tensor
    sampled_slots: I64Array


def build_inputs(state: BatchState, rows: StepRows, device: torch.device) -> StepInputs:
    """Return the inputs of one step; ``rows`` must come from ``state.apply`` of that step."""
    ends = rows.ends
    offsets = np.cumsum(rows.num_tokens)  # [N], the packed row after each sequence's last
    token_slots, positions = _expand(rows, offsets)
    block_indices, places = np.divmod(positions, state.block_size)
    longest = int(ends.max(initial=0))
    is_sampled = ends == state.num_tokens[rows.slots]
    lengths = ends[rows.num_chunks :]  # [D]
    attention = AttentionInputs(
        block_size=state.block_size,
        positions=_to_device(positions, device),
        max_length=longest,
        write_blocks=_to_device(state.block_table[token_slots, block_indices], device),
        write_places=_to_device(places, device),
        chunks=_build_chunks(state, rows, offsets, device),
        decode_start=len(positions) - len(lengths),
        decode_blocks=_to_device(_decode_blocks(state, rows, lengths), device),
        decode_lengths=_to_device(lengths, device),
        repeats_decodes=rows.repeats_decodes,
    )
    return StepInputs(
        token_ids=_to_device(state.tokens[token_slots, positions].astype(np.int64), device),
        attention=attention,
        sampled_rows=_to_device(offsets[is_sampled] - 1, device),
        sampled_slots=rows.slots[is_sampled],
    )


def _expand(rows: StepRows, offsets: I64Array) -> tuple[I64Array, I64Array]:
    """Return the slot and the position of each token, int64 [T]."""
    if not rows.num_chunks:  # the usual step: a row is a token
        return rows.slots, rows.starts
    total = int(offsets[-1])
    return np.repeat(rows.slots, rows.num_tokens), np.arange(total) + np.repeat(rows.starts + rows.num_tokens - offsets, rows.num_tokens)


def _build_chunks(state: BatchState, rows: StepRows, offsets: I64Array, device: torch.device) -> tuple[ChunkSpan, ...]:
    spans = []
    for i in range(rows.num_chunks):
        count, context = int(rows.num_tokens[i]), int(rows.ends[i])
        blocks = state.block_table[rows.slots[i], : -(-context // state.block_size)]
        # A copy: the table changes while a device may still be reading.
        spans.append(ChunkSpan(int(offsets[i]) - count, count, context, _to_device(blocks.copy(), device)))
    return tuple(spans)


def _decode_blocks(state: BatchState, rows: StepRows, lengths: I64Array) -> I64Array:
    """Return int64 [D, B], the blocks of each row's context; B is that of the longest one."""
    width = -(-int(lengths.max(initial=0)) // state.block_size)
    blocks: I64Array = state.block_table[rows.slots[rows.num_chunks :], :width]
    return blocks


def _to_device(array: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
