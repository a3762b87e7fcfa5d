"""Causal attention over the paged KV cache, behind an interface that a GPU backend can fill.

The rows of a step are packed: the chunks first, one after another, then one row for each decoding sequence. A layer's cache is
one tensor [2, slots, K, E], keys then values; slot = block_id * block_size + offset. Slots 0 to block_size - 1 are a block that
no sequence owns, and padding points there.

T tokens, D decode rows, C context positions, H heads, K kv heads, G = H / K, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ChunkSpan:
    """The rows of one sequence's prompt part within the step.

    Args:
        start: its first row in the packed step.
        num_tokens: its rows.
        read_slots: int64 [C], the KV slots of its whole context in order, the chunk's own included.
    """

    start: int
    num_tokens: int
    read_slots: Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Where the tokens of a step lie in the KV cache; the same for every layer.

    Args:
        positions: int64 [T], each token's place in its sequence.
        write_slots: int64 [T], the KV slot of each token.
        chunks: the prompt parts, in the order of their rows, from row 0 without gaps.
        decode_start: rows from here to T are one token of one sequence each.
        decode_read_slots: int64 [D, C], the slots of each decode row's context, padded with 0.
        decode_lengths: int64 [D], the context length of each decode row, its own token included; at least 1.
    """

    positions: Tensor
    write_slots: Tensor
    chunks: tuple[ChunkSpan, ...]
    decode_start: int
    decode_read_slots: Tensor
    decode_lengths: Tensor


AttendLayer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(query [T, H, E], key [T, K, E], value [T, K, E], cache [2, slots, K, E]) -> [T, H * E]: stores key and value in the layer's
cache, then attends."""


class AttentionBackend(Protocol):
    """A way to compute attention."""

    def begin_step(self, inputs: AttentionInputs) -> AttendLayer:
        """Prepare what the layers of one step share (masks, say) and return the function that each of them calls."""


class SdpaAttention:
    """Attention by ``scaled_dot_product_attention``: decode rows in one padded call, each chunk in a call of its own.

    Args:
        num_kv_heads: KV heads of this rank.
        sliding_window: W, where a token sees the W latest positions; None where it sees all.
        dtype: of queries and cache; additive masks must match it.
    """

    def __init__(self, num_kv_heads: int, *, sliding_window: int | None, dtype: torch.dtype) -> None:
        self.num_kv_heads = num_kv_heads
        self.sliding_window = sliding_window
        self.dtype = dtype

    def begin_step(self, inputs: AttentionInputs) -> AttendLayer:
        """Build the masks of the step, as ``AttentionBackend`` asks."""
        num_decodes = inputs.decode_lengths.shape[0]
        decode_mask = self._decode_mask(inputs) if num_decodes else None
        chunk_masks = [self._chunk_mask(chunk) for chunk in inputs.chunks]

        def attend(query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
            cache[0].index_copy_(0, inputs.write_slots, key)
            cache[1].index_copy_(0, inputs.write_slots, value)
            outputs = [self._attend_chunk(chunk, mask, query, key, value, cache) for chunk, mask in zip(inputs.chunks, chunk_masks)]
            if decode_mask is not None:
                outputs.append(self._attend_decodes(inputs, decode_mask, query, cache))
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return attend

    def _decode_mask(self, inputs: AttentionInputs) -> Tensor:
        """Additive [D, 1, 1, C]."""
        lengths = inputs.decode_lengths[:, None]
        places = torch.arange(inputs.decode_read_slots.shape[1], device=lengths.device)
        hidden = places >= lengths
        if self.sliding_window is not None:
            hidden |= places < lengths - self.sliding_window
        return self._additive(hidden)[:, None, None]

    def _chunk_mask(self, chunk: ChunkSpan) -> Tensor | None:
        """Additive [rows, C]; None where plain causality over the chunk's own rows says it all."""
        context, window = chunk.read_slots.shape[0], self.sliding_window
        if context == chunk.num_tokens and (window is None or context <= window):
            return None
        keys = torch.arange(context, device=chunk.read_slots.device)
        queries = keys[context - chunk.num_tokens :, None]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return self._additive(hidden)

    def _additive(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)

    def _attend_chunk(self, chunk: ChunkSpan, mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor, cache: Tensor) -> Tensor:
        rows = slice(chunk.start, chunk.start + chunk.num_tokens)
        keys, values = (key[rows], value[rows]) if mask is None else (cache[i].index_select(0, chunk.read_slots) for i in (0, 1))
        q, k, v = (x.transpose(0, 1)[None] for x in (query[rows], keys, values))  # [1, H or K, rows or C, E]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)

    def _attend_decodes(self, inputs: AttentionInputs, mask: Tensor, query: Tensor, cache: Tensor) -> Tensor:
        num_rows, context = inputs.decode_read_slots.shape
        shape = (num_rows, context, self.num_kv_heads, query.shape[-1])
        slots = inputs.decode_read_slots.flatten()
        # Each half of the cache is gathered along its first dim: over both at once, along dim 1, took three times as long.
        keys, values = (cache[i].index_select(0, slots).view(shape).transpose(1, 2) for i in (0, 1))  # [D, K, C, E]
        # The G heads that share a KV head stand as G query rows: 30 to 45 % faster on a CPU than enable_gqa.
        grouped = query[inputs.decode_start :].view(num_rows, self.num_kv_heads, -1, query.shape[-1])  # [D, K, G, E]
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1)
