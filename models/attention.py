"""Causal attention over the paged KV cache, behind an interface that a GPU backend can fill.

The rows of a step are packed: the chunks first, one after another, then the decode rows, each one token of a sequence, or several where
drafts are verified. A layer's cache is a
``KvLayer``, a tensor [blocks, 2K, P, E]: in a block the P positions of each head's keys, then those of its values. So the context of
a head is read a block at a time, P * E numbers in a row, and what is read needs no transposing. Block 0 belongs to no sequence, and
padding points there.

T tokens, D decode rows, Q tokens of the longest of them, B blocks of a context, C positions of it, P positions in a block, H heads,
K kv heads, G = H / K, E head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_SPARE_POSITIONS = 64  # room to grow into for each kept context
_MAX_KEPT_BYTES = 256 << 20  # of all layers


class KvLayer:
    """The KV cache of one layer.

    Attributes:
        cache: [blocks, 2K, P, E], zeroed: padding is read, and a NaN there would pass through a weight of zero.
        positions: the same memory as [blocks * 2K * P, E]; blocks: as [blocks * 2K, P * E].
        contexts: what the attention backend keeps for the layer from one step to the next.
    """

    def __init__(
        self, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.cache = torch.zeros(num_blocks, 2 * num_kv_heads, block_size, head_dim, dtype=dtype, device=device)
        self.positions = self.cache.view(-1, head_dim)
        self.blocks = self.cache.view(-1, block_size * head_dim)
        self.contexts = self.cache.new_empty(0)


@dataclass(frozen=True)
class ChunkSpan:
    """The rows of one sequence's prompt part within the step.

    Args:
        start: its first row in the packed step.
        num_tokens: its rows.
        context: positions of its whole context, the chunk's own included.
        blocks: int64 [B], the blocks of that context in order.
    """

    start: int
    num_tokens: int
    context: int
    blocks: Tensor


@dataclass(frozen=True)
class RowSpread:
    """How decode rows of several tokens, packed one row after another, lie in a rectangle of D rows and Q columns.

    Args:
        width: Q, at least 2.
        sources: int64 [D, Q], which of the packed tokens stands at each place; a short row's last one fills it up.
        places: int64 [number of tokens], in the flattened rectangle, of each packed token.
    """

    width: int
    sources: Tensor
    places: Tensor


@dataclass(frozen=True)
class AttentionInputs:
    """Where the tokens of a step lie in the KV cache; the same for every layer.

    Args:
        block_size: P.
        positions: int64 [T], each token's place in its sequence.
        max_length: positions of the longest context, known without asking the device.
        write_blocks, write_places: int64 [T], the KV block of each token and its place in it.
        chunks: the prompt parts, in the order of their rows, from row 0 without gaps.
        decode_start: rows from here to T are decode rows.
        decode_blocks: int64 [D, B], the blocks of each decode row's context, padded with 0.
        decode_lengths: int64 [D], the context length of each decode row's first token, itself included; at least 1. Each further token
            sees one position more.
        decode_spread: the tokens of each decode row; None where each has one.
        repeats_decodes: the decode rows are those of the step before with these caches, and each goes on within or right behind the
            positions that it had there; there are no chunks.
    """

    block_size: int
    positions: Tensor
    max_length: int
    write_blocks: Tensor
    write_places: Tensor
    chunks: tuple[ChunkSpan, ...]
    decode_start: int
    decode_blocks: Tensor
    decode_lengths: Tensor
    decode_spread: RowSpread | None = None
    repeats_decodes: bool = False

    @property
    def num_decodes(self) -> int:
        """D."""
        return self.decode_lengths.shape[0]

    @property
    def decode_width(self) -> int:
        """Q."""
        return 1 if self.decode_spread is None else self.decode_spread.width


AttendLayer = Callable[[Tensor, Tensor, KvLayer], Tensor]
"""(query [T, H, E], keys and values [T, 2K, E], layer) -> [T, H * E]: stores keys and values in the layer's cache, then attends."""


class AttentionBackend(Protocol):
    """A way to compute attention."""

    def begin_step(self, inputs: AttentionInputs) -> AttendLayer:
        """Prepare what the layers of one step share (masks, say) and return the function that each of them calls."""


class PagedAttention:
    """Attention over gathered blocks: decode rows in one padded call, each chunk in a call of its own.

    What lies past a context in its last block is masked, and must only be finite.

    On a CPU in float32 the gathered contexts of decode rows are kept, and while the same rows go on, each gets its new position and
    nothing is gathered: at 512 positions that was most of a step. It costs their memory again, so above ``_MAX_KEPT_BYTES`` they are
    gathered at each step.

    Args:
        num_heads, num_kv_heads: of this rank.
        head_dim: E.
        num_layers: that call it in a step.
        sliding_window: W, where a token sees the W latest positions; None where it sees all.
        dtype: of queries and cache; additive masks must match it.
        device: of all tensors.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_layers: int,
        *,
        sliding_window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_kv_heads = num_kv_heads
        self.group_size = num_heads // num_kv_heads
        self.head_dim = head_dim
        self.num_layers = num_layers
        self.sliding_window = sliding_window
        self.dtype = dtype
        self.scale = head_dim**-0.5
        # Matrix products take two thirds of the time of scaled_dot_product_attention for one row a sequence, with several threads a
        # third; but only that one adds up halves in float32.
        self.has_plain_decode = device.type == "cpu" and dtype == torch.float32
        self._rows_per_block = 2 * num_kv_heads
        self._rows = torch.arange(2 * num_kv_heads, device=device)
        self._shared = torch.empty(0, dtype=dtype, device=device)
        self._kept_shape = (0, 0)  # decode rows and positions of the layers' kept contexts

    def begin_step(self, inputs: AttentionInputs) -> AttendLayer:
        """Build the masks and indices of the step, as ``AttentionBackend`` asks."""
        write_rows = torch.add(inputs.write_places[:, None], self._block_rows(inputs.write_blocks), alpha=inputs.block_size)  # [T, 2K]
        parts = [self._begin_chunk(chunk) for chunk in inputs.chunks]
        if inputs.num_decodes:
            parts.append(self._begin_decodes(inputs))
        else:
            self._kept_shape = (0, 0)

        def attend(query: Tensor, keys_values: Tensor, layer: KvLayer) -> Tensor:
            layer.positions.index_put_((write_rows,), keys_values)
            if len(parts) == 1:
                return parts[0](query, keys_values, layer)
            return torch.cat([attend_part(query, keys_values, layer) for attend_part in parts])

        return attend

    def _begin_chunk(self, chunk: ChunkSpan) -> AttendLayer:
        mask = self._chunk_mask(chunk)
        rows = slice(chunk.start, chunk.start + chunk.num_tokens)
        read_rows = self._block_rows(chunk.blocks).t().flatten()  # [2K * B]

        def attend_chunk(query: Tensor, keys_values: Tensor, layer: KvLayer) -> Tensor:
            """Attend from the chunk's rows."""
            if mask is None:
                context = keys_values[rows].transpose(0, 1)  # [2K, rows, E]
            else:
                gathered = self._gather_shared(layer, read_rows)
                context = gathered.view(self._rows_per_block, -1, self.head_dim)[:, : chunk.context]
            keys, values = context[None].chunk(2, 1)  # [1, K, rows or C, E]
            queries = query[rows].transpose(0, 1)[None]
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            return out[0].transpose(0, 1).flatten(1)

        return attend_chunk

    def _begin_decodes(self, inputs: AttentionInputs) -> AttendLayer:
        if not self.has_plain_decode:
            return self._begin_fused_decodes(inputs)
        num_groups, context = inputs.num_decodes * self.num_kv_heads, inputs.decode_blocks.shape[1] * inputs.block_size
        extend = self._begin_contexts(inputs)
        mask = self._decode_mask(inputs, context).expand(-1, self.num_kv_heads, -1, -1).flatten(0, 1)  # [D * K, 1 or Q * G, C]

        def attend_decodes(query: Tensor, keys_values: Tensor, layer: KvLayer) -> Tensor:
            keys, values = extend(keys_values, layer)  # [D * K, at least C, E]
            queries = self._group_queries(query, inputs).reshape(num_groups, -1, self.head_dim)
            scores = torch.baddbmm(mask, queries, keys[:, :context].transpose(1, 2), alpha=self.scale)
            return self._ungroup(torch.bmm(scores.softmax(-1), values[:, :context]), inputs)

        return attend_decodes

    def _group_queries(self, query: Tensor, inputs: AttentionInputs) -> Tensor:
        """Return the queries of the decode rows, [D, K, Q * G, E]: the heads that share a KV head stand as rows, less to read than
        enable_gqa has."""
        rows, spread = query[inputs.decode_start :], inputs.decode_spread
        shape = (inputs.num_decodes, self.num_kv_heads, -1, self.head_dim)
        if spread is None:
            return rows.reshape(shape)
        spaced = rows.index_select(0, spread.sources.flatten())
        return spaced.view(inputs.num_decodes, spread.width, self.num_kv_heads, self.group_size, -1).transpose(1, 2).reshape(shape)

    def _ungroup(self, out: Tensor, inputs: AttentionInputs) -> Tensor:
        """Return [tokens of the decode rows, H * E] of what was computed for ``_group_queries``."""
        spread = inputs.decode_spread
        if spread is None:
            return out.reshape(inputs.num_decodes, -1)
        spaced = out.view(inputs.num_decodes, self.num_kv_heads, spread.width, self.group_size, self.head_dim)
        return spaced.transpose(1, 2).reshape(inputs.num_decodes * spread.width, -1).index_select(0, spread.places)

    def _begin_contexts(self, inputs: AttentionInputs) -> Callable[[Tensor, KvLayer], tuple[Tensor, ...]]:
        """Return what gives a layer's keys and values of the decode rows, each [D * K, at least C, E]."""
        num_rows, capacity = self._kept_shape
        if inputs.repeats_decodes and num_rows == inputs.num_decodes and inputs.decode_blocks.shape[1] * inputs.block_size <= capacity:
            return self._begin_extension(inputs, capacity)
        rows, capacity = self._decode_rows(inputs, _SPARE_POSITIONS)
        num_bytes = self.num_layers * len(rows) * inputs.block_size * self.head_dim * self.dtype.itemsize
        if num_bytes > _MAX_KEPT_BYTES:
            self._kept_shape = (0, 0)
            rows, _ = self._decode_rows(inputs, 0)
            return lambda _, layer: self._split(self._gather_shared(layer, rows), inputs)
        self._kept_shape = (inputs.num_decodes, capacity)

        def gather(_: Tensor, layer: KvLayer) -> tuple[Tensor, ...]:
            layer.contexts = layer.blocks.index_select(0, rows)
            return self._split(layer.contexts, inputs)

        return gather

    def _begin_extension(self, inputs: AttentionInputs, capacity: int) -> Callable[[Tensor, KvLayer], tuple[Tensor, ...]]:
        """Return what writes the new positions of each decode row into a layer's kept contexts [2, D, K, capacity, E]."""
        num_rows, heads = inputs.num_decodes, self.num_kv_heads
        firsts = torch.arange(0, 2 * num_rows * heads * capacity, capacity).view(2, num_rows, heads).transpose(0, 1).flatten(1)  # [D, 2K]
        if inputs.decode_spread is not None:
            firsts = firsts.index_select(0, inputs.decode_spread.places // inputs.decode_spread.width)
        places = firsts.add_(inputs.positions[:, None])  # [T, 2K]

        def extend(keys_values: Tensor, layer: KvLayer) -> tuple[Tensor, ...]:
            layer.contexts.view(-1, self.head_dim).index_put_((places,), keys_values)
            return self._split(layer.contexts, inputs)

        return extend

    def _begin_fused_decodes(self, inputs: AttentionInputs) -> AttendLayer:
        """The same with ``scaled_dot_product_attention``."""
        read_rows, context = self._decode_rows(inputs, 0)
        mask = self._decode_mask(inputs, context)

        def attend_decodes(query: Tensor, keys_values: Tensor, layer: KvLayer) -> Tensor:
            gathered = self._gather_shared(layer, read_rows)
            keys, values = gathered.view(2, inputs.num_decodes, self.num_kv_heads, -1, self.head_dim).unbind()
            out = F.scaled_dot_product_attention(self._group_queries(query, inputs), keys, values, attn_mask=mask)
            return self._ungroup(out, inputs)

        return attend_decodes

    def _decode_rows(self, inputs: AttentionInputs, num_spare: int) -> tuple[Tensor, int]:
        """Return int64 [2 * D * K * B], where ``KvLayer.blocks`` has the contexts of the decode rows with ``num_spare`` positions more of
        block 0 at least, and the positions of each with these."""
        blocks = F.pad(inputs.decode_blocks, (0, -(-num_spare // inputs.block_size)))
        rows = self._block_rows(blocks).view(inputs.num_decodes, -1, 2, self.num_kv_heads)
        return rows.permute(2, 0, 3, 1).flatten(), blocks.shape[1] * inputs.block_size

    def _split(self, gathered: Tensor, inputs: AttentionInputs) -> tuple[Tensor, ...]:
        """Return keys and values, each [D * K, C, E], of what was gathered for ``_decode_rows``."""
        return gathered.view(2, inputs.num_decodes * self.num_kv_heads, -1, self.head_dim).unbind()

    def _block_rows(self, blocks: Tensor) -> Tensor:
        """Return [..., 2K], where ``KvLayer.blocks`` has the ``blocks`` [...]."""
        return torch.add(self._rows, blocks[..., None], alpha=self._rows_per_block)

    def _gather_shared(self, layer: KvLayer, rows: Tensor) -> Tensor:
        """Return those rows of ``KvLayer.blocks``, until the next call.

        Into memory that all layers share: to get megabytes from the system each time took ten times as long as to copy them.
        """
        size = len(rows) * layer.blocks.shape[1]
        if self._shared.numel() < size:
            self._shared = torch.empty(2 * size, dtype=self.dtype, device=rows.device)
        return torch.index_select(layer.blocks, 0, rows, out=self._shared[:size].view(len(rows), -1))

    def _decode_mask(self, inputs: AttentionInputs, context: int) -> Tensor:
        """Additive [D, 1, 1, C], or where decode rows have several tokens [D, 1, Q * G, C]."""
        lengths, width = inputs.decode_lengths[:, None], inputs.decode_width
        places = torch.arange(context, device=lengths.device)
        if width > 1:
            lengths = lengths[:, None] + torch.arange(width, device=lengths.device)[:, None]  # [D, Q, 1]
        hidden = places >= lengths
        if self.sliding_window is not None:
            hidden |= places < lengths - self.sliding_window
        mask = self._additive(hidden)[:, None]
        return mask[:, None] if width == 1 else mask.repeat_interleave(self.group_size, 2)

    def _chunk_mask(self, chunk: ChunkSpan) -> Tensor | None:
        """Additive [rows, C]; None where plain causality over the chunk's own rows says it all."""
        context, window = chunk.context, self.sliding_window
        if context == chunk.num_tokens and (window is None or context <= window):
            return None
        keys = torch.arange(context, device=chunk.blocks.device)
        queries = keys[context - chunk.num_tokens :, None]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return self._additive(hidden)

    def _additive(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
