"""Causal attention over a paged cache of latents: what DeepSeek caches of a position in place of keys and values of heads.

A layer's cache is [blocks, 1, P, Z]: of each position the latent and the rotated dims that all heads share. Ranks have heads of their
own and copies of the latents. Decode rows are absorbed (see ``latent_expansion``), and chunks are too where that is cheaper than to expand
their context into keys and values.

T tokens, D decode rows, Q tokens of the longest of them, B blocks of a context, C positions of it, P positions in a block, H heads of this
rank, Z numbers cached of a position, R of these of the latent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..latent_config import LatentConfig
from .attention import AttendLayer, AttentionInputs, ChunkSpan, KvLayer
from .latent_expansion import LatentExpansion, is_expansion_cheaper


class LatentLayer(KvLayer):
    """The cache of one layer, and what makes keys and values of it.

    Attributes:
        cache: [blocks, 1, P, Z], zeroed as in any ``KvLayer``; ``positions`` is the same memory as [blocks * P, Z], ``blocks`` as
            [blocks, P * Z].
        expansion: the layer's.
    """

    def __init__(self, num_blocks: int, block_size: int, expansion: LatentExpansion, *, dtype: torch.dtype, device: torch.device) -> None:
        size = expansion.latent.cached_size
        self.cache = torch.zeros(num_blocks, 1, block_size, size, dtype=dtype, device=device)
        self.positions = self.cache.view(-1, size)
        self.blocks = self.cache.view(-1, block_size * size)
        self.contexts = self.cache.new_empty(0)
        self.expansion = expansion


class PagedLatentAttention:
    """Attention over gathered blocks of latents: decode rows in one padded call, each chunk in a call of its own.

    Its ``AttendLayer`` takes queries [T, H, dims of a head], what is cached [T, 1, Z] and a ``LatentLayer``.

    Args:
        num_heads: H.
        latent: the sizes.
        scale: what scores are multiplied by.
        dtype: of queries and cache; additive masks must match it.
        device: of all tensors.
    """

    def __init__(self, num_heads: int, latent: LatentConfig, scale: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.num_heads = num_heads
        self.latent = latent
        self.size = latent.cached_size
        self.scale = scale
        self.dtype = dtype
        # As in PagedAttention: products take half to four fifths of the time there, but only the kernel adds up halves in float32.
        self.has_plain_decode = device.type == "cpu" and dtype == torch.float32
        self._shared = torch.empty(0, dtype=dtype, device=device)

    def begin_step(self, inputs: AttentionInputs) -> AttendLayer:
        """Build the masks and indices of the step, as ``AttentionBackend`` asks."""
        write_rows = torch.add(inputs.write_places, inputs.write_blocks, alpha=inputs.block_size)  # [T]
        parts = [self._begin_chunk(chunk) for chunk in inputs.chunks]
        if inputs.num_decodes:
            parts.append(self._begin_decodes(inputs))

        def attend(query: Tensor, latents: Tensor, layer: KvLayer) -> Tensor:
            layer.positions.index_put_((write_rows,), latents[:, 0])
            if len(parts) == 1:
                return parts[0](query, latents, layer)
            return torch.cat([attend_part(query, latents, layer) for attend_part in parts])

        return attend

    def _begin_chunk(self, chunk: ChunkSpan) -> AttendLayer:
        if not is_expansion_cheaper(self.latent, chunk.num_tokens, chunk.context):
            return self._begin_absorbed(chunk)
        return self._begin_whole(chunk) if chunk.context == chunk.num_tokens else self._begin_expanded(chunk)

    def _begin_whole(self, chunk: ChunkSpan) -> AttendLayer:
        """For a chunk that is its context: its own latents and plain causality."""
        rows = slice(chunk.start, chunk.start + chunk.num_tokens)

        def attend_whole(query: Tensor, latents: Tensor, layer: KvLayer) -> Tensor:
            keys, values = _expansion_of(layer).expand(latents[rows, 0])
            parts = query[rows].transpose(0, 1)[None], keys[None], values[None]
            return F.scaled_dot_product_attention(*parts, is_causal=True, scale=self.scale)[0].transpose(0, 1).flatten(1)

        return attend_whole

    def _begin_expanded(self, chunk: ChunkSpan) -> AttendLayer:
        rows, mask = slice(chunk.start, chunk.start + chunk.num_tokens), self._chunk_mask(chunk)

        def attend_expanded(query: Tensor, latents: Tensor, layer: KvLayer) -> Tensor:
            keys, values = _expansion_of(layer).expand(self._gather(layer, chunk.blocks).view(-1, self.size)[: chunk.context])
            parts = query[rows].transpose(0, 1)[None], keys[None], values[None]
            return F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=self.scale)[0].transpose(0, 1).flatten(1)

        return attend_expanded

    def _begin_absorbed(self, chunk: ChunkSpan) -> AttendLayer:
        rows, mask = slice(chunk.start, chunk.start + chunk.num_tokens), self._chunk_mask(chunk)[None]

        def attend_absorbed(query: Tensor, latents: Tensor, layer: KvLayer) -> Tensor:
            context = self._gather(layer, chunk.blocks).view(1, -1, self.size)[:, : chunk.context]
            queries = _expansion_of(layer).absorb(query[rows]).transpose(0, 1)  # [H, rows, Z]
            out = self._attend(queries, context.expand(len(queries), -1, -1), mask)
            return _expansion_of(layer).release(out.transpose(0, 1))

        return attend_absorbed

    def _begin_decodes(self, inputs: AttentionInputs) -> AttendLayer:
        start, num_rows, blocks = inputs.decode_start, inputs.num_decodes, inputs.decode_blocks.flatten()
        spread = inputs.decode_spread
        mask = self._decode_mask(inputs)

        def attend_decodes(query: Tensor, latents: Tensor, layer: KvLayer) -> Tensor:
            """Attend from the decode rows."""
            context = self._gather(layer, blocks).view(num_rows, -1, self.size)
            absorbed = _expansion_of(layer).absorb(query[start:])
            if spread is None:
                return _expansion_of(layer).release(self._attend(absorbed, context, mask))
            spaced = absorbed.index_select(0, spread.sources.flatten()).view(num_rows, -1, self.size)  # [D, Q * H, Z]
            out = self._attend(spaced, context, mask).view(num_rows * spread.width, -1, self.latent.rank)
            return _expansion_of(layer).release(out.index_select(0, spread.places))

        return attend_decodes

    def _attend(self, query: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """Return the weighted sums of latents [S, rows, R].

        Args:
            query: [S, rows, Z].
            context: [S, C, Z].
            mask: additive [S or 1, rows or 1, C].
        """
        values = context[..., : self.latent.rank]
        if self.has_plain_decode:
            scores = torch.baddbmm(mask, query, context.transpose(1, 2), alpha=self.scale)
            return torch.bmm(scores.softmax(-1), values)
        parts = query[:, None], context[:, None], values[:, None]
        return F.scaled_dot_product_attention(*parts, attn_mask=mask[:, None], scale=self.scale)[:, 0]

    def _gather(self, layer: KvLayer, blocks: Tensor) -> Tensor:
        """Return ``blocks`` of the cache, [blocks, P * Z], until the next call: into memory of all layers, as ``PagedAttention`` does."""
        size = len(blocks) * layer.blocks.shape[1]
        if self._shared.numel() < size:
            self._shared = torch.empty(2 * size, dtype=self.dtype, device=blocks.device)
        return torch.index_select(layer.blocks, 0, blocks, out=self._shared[:size].view(len(blocks), -1))

    def _decode_mask(self, inputs: AttentionInputs) -> Tensor:
        """Additive [D, 1, C], or where decode rows have several tokens [D, Q * H, C]."""
        context, lengths = inputs.decode_blocks.shape[1] * inputs.block_size, inputs.decode_lengths[:, None, None]
        if inputs.decode_width > 1:
            lengths = lengths + torch.arange(inputs.decode_width, device=lengths.device).repeat_interleave(self.num_heads)[:, None]
        return self._additive(torch.arange(context, device=lengths.device) >= lengths)

    def _chunk_mask(self, chunk: ChunkSpan) -> Tensor:
        """Additive [rows, C]."""
        keys = torch.arange(chunk.context, device=chunk.blocks.device)
        return self._additive(keys > keys[chunk.context - chunk.num_tokens :, None])

    def _additive(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _expansion_of(layer: KvLayer) -> LatentExpansion:
    assert isinstance(layer, LatentLayer)
    return layer.expansion
