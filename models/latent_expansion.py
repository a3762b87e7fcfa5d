"""The weight that makes keys and values of latents, on one tensor-parallel rank, and the two ways to use it.

    expanded   keys and values of each position are computed, and attention is that of heads as anywhere
    absorbed   a head's query is carried to the latents, all heads attend to those as to one KV head, and what comes out is carried
               to the head's values: nothing is computed for a position of the context

For V3's sizes a query that meets a position costs 1,088 products a head absorbed and 320 expanded, but to expand a position takes
131,072: so one token is absorbed, a prompt from its beginning is expanded, and a chunk after a long context from 170 tokens on.

D rows of queries, C positions of a context, H heads of this rank, N dims that are not rotated, Q that are, V value dims, R of a latent.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..latent_config import LatentConfig
from .layers import ShardedModule, WeightShard, empty_parameter


def is_expansion_cheaper(latent: LatentConfig, num_tokens: int, context: int) -> bool:
    """Return whether the last ``num_tokens`` of ``context`` positions take fewer products expanded than absorbed."""
    saved_at_each_pair = 2 * latent.rank - latent.nope_dim - latent.value_dim
    of_each_row = latent.rank * (latent.nope_dim + latent.value_dim)  # to carry a query there and back, or to expand a position
    return num_tokens * context * saved_at_each_pair >= (context - num_tokens) * of_each_row


class LatentExpansion(ShardedModule):
    """The heads of one rank of a layer's ``kv_b_proj``. Never packed: both forms read the same weight, as matrices of each head or of all.

    Args:
        name: of the linear in the checkpoint.
        latent: the sizes.
        num_heads: H; this rank's are the ``rank``-th H.
        dtype: of the weight.
        device: where it lives.
    """

    def __init__(self, name: str, latent: LatentConfig, num_heads: int, rank: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name = name
        self.latent = latent
        self.num_heads = num_heads
        num_rows = num_heads * (latent.nope_dim + latent.value_dim)
        self.rows = slice(rank * num_rows, (rank + 1) * num_rows)
        self.weight = empty_parameter(num_rows, latent.rank, dtype=dtype, device=device)

    def shards(self) -> Iterator[WeightShard]:
        yield WeightShard(f"{self.name}.weight", self.weight, slice(0, self.weight.shape[0]), (self.rows, slice(None)))

    def scale_inputs(self, scale: Tensor) -> None:
        """Multiply the weight's columns by ``scale`` [R]."""
        self.weight.mul_(scale)

    def expand(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys [H, C, N + Q] and values [H, C, V] of cached positions ``context`` [C, R + Q]."""
        nope_dim, rank = self.latent.nope_dim, self.latent.rank
        both = F.linear(context[:, :rank], self.weight).view(len(context), self.num_heads, -1)  # [C, H, N + V]
        shared = context[:, None, rank:].expand(-1, self.num_heads, -1)
        keys = torch.cat((both[..., :nope_dim], shared), -1)
        return keys.transpose(0, 1), both[..., nope_dim:].transpose(0, 1)

    def absorb(self, query: Tensor) -> Tensor:
        """Return the queries [D, H, R + Q] that cached positions are compared with, of ``query`` [D, H, N + Q]."""
        nope_dim = self.latent.nope_dim
        carried = torch.bmm(query[..., :nope_dim].transpose(0, 1), self._by_head()[:, :nope_dim])  # [H, D, R]
        return torch.cat((carried.transpose(0, 1), query[..., nope_dim:]), -1)

    def release(self, latents: Tensor) -> Tensor:
        """Return the outputs [D, H * V] of the heads, of the weighted sums of latents [D, H, R] that they attended to."""
        by_head = self._by_head()[:, self.latent.nope_dim :]
        return torch.bmm(latents.transpose(0, 1), by_head.transpose(1, 2)).transpose(0, 1).flatten(1)

    def _by_head(self) -> Tensor:
        """Return the weight as [H, N + V, R]."""
        return self.weight.view(self.num_heads, -1, self.latent.rank)
