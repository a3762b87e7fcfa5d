"""DeepSeek's latent attention on one tensor-parallel rank: the linears and norms before and after what ``latent_attention`` does.

    x -+- q_a -> norm -> q_b -> queries of this rank's heads -+--> attention -> o -> all-reduce
       +- kv_a -> norm, rotation -> what is cached -----------+

Queries of a checkpoint without a ``q_lora_rank`` come from x in the first product. That product, its norms and the cache are the same
on all ranks; what belongs to heads is split. Where the checkpoint rotates neighbouring dims against each other, their rows are loaded
sorted into the halves that ``rotate_`` takes: queries and keys alike, so that no score changes.

T tokens, D model, H heads of this rank, N dims of a head that are not rotated, Q that are, V value dims, R numbers of a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..latent_config import LatentConfig
from ..model_config import ModelConfig
from .attention import AttendLayer, KvLayer
from .communicator import Communicator
from .latent_attention import PagedLatentAttention
from .latent_expansion import LatentExpansion
from .layers import ColumnParallelLinear, ColumnPart, RmsNorm, RowParallelLinear
from .rope import rotate_

_NORM_EPS = 1e-6  # of the two norms here, whatever rms_norm_eps is for the others


class DeepseekAttention(nn.Module):
    """Self-attention with one fused product for all that is made of the hidden state.

    Args:
        prefix: name of the attention in the checkpoint.
        config: has a ``latent``.
        communicator: the tensor-parallel axis.
        dtype: of the weights.
        device: where they live.
    """

    def __init__(self, prefix: str, config: ModelConfig, communicator: Communicator, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        assert config.latent is not None
        self.latent = latent = config.latent
        self.num_heads = config.num_heads // communicator.size
        own_heads = range(communicator.rank * self.num_heads, (communicator.rank + 1) * self.num_heads)
        name = f"{prefix}.{'q_proj' if latent.query_rank is None else 'q_b_proj'}"
        heads = [part for head in own_heads for part in _parts(name, head * latent.head_dim, latent.nope_dim, latent)]
        query = heads if latent.query_rank is None else [ColumnPart(f"{prefix}.q_a_proj", 0, latent.query_rank)]
        cached = _parts(f"{prefix}.kv_a_proj_with_mqa", 0, latent.rank, latent)
        self.query_size = sum(part.num_rows for part in query)
        self.down = ColumnParallelLinear([*query, *cached], config.hidden_size, bias=config.attention_bias, dtype=dtype, device=device)
        self.query_norm: RmsNorm | None = None
        self.query_up: ColumnParallelLinear | None = None
        if latent.query_rank is not None:
            self.query_norm = RmsNorm(f"{prefix}.q_a_layernorm", latent.query_rank, _NORM_EPS, dtype=dtype, device=device)
            self.query_up = ColumnParallelLinear(heads, latent.query_rank, bias=False, dtype=dtype, device=device)
        self.norm = RmsNorm(f"{prefix}.kv_a_layernorm", latent.rank, _NORM_EPS, dtype=dtype, device=device)
        self.expansion = LatentExpansion(f"{prefix}.kv_b_proj", latent, self.num_heads, communicator.rank, dtype=dtype, device=device)
        self.output = RowParallelLinear(
            f"{prefix}.o_proj",
            config.num_heads * latent.value_dim,
            config.hidden_size,
            communicator,
            bias=config.output_bias,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: AttendLayer, cache: KvLayer) -> Tensor:
        """Return what attention adds to the rows ``x`` [T, D], of which ``cache``, a ``LatentLayer``, stores the latents."""
        down = self.down.forward(x)
        query, cached = down[:, : self.query_size], down[:, None, self.query_size :]  # [T, 1, R + Q]
        if self.query_norm is not None and self.query_up is not None:
            query = self.query_up.forward(self.query_norm.forward(query))
        heads = query.view(len(x), self.num_heads, -1)  # [T, H, N + Q]
        latents = cached[..., : self.latent.rank]
        latents.copy_(self.norm.forward(latents))
        rotate_(heads[..., self.latent.nope_dim :], rotation)
        rotate_(cached[..., self.latent.rank :], rotation)
        return self.output.forward(attend(heads, cached, cache))

    def pack(self, input_scale: Tensor | None) -> None:
        """Pack the products; ``input_scale`` is for the first. The expansion is none, and takes only the norm before it."""
        self.down.pack(input_scale)
        if self.query_norm is not None and self.query_up is not None:
            self.query_up.pack(self.query_norm.fold())
        scale = self.norm.fold()
        if scale is not None:
            self.expansion.scale_inputs(scale)
        self.output.pack()


def _parts(name: str, start: int, num_plain: int, latent: LatentConfig) -> list[ColumnPart]:
    """Return ``num_plain`` rows from ``start`` on and those of the rotated dims after them, these in halves."""
    first, half = start + num_plain, latent.rope_dim // 2
    if not latent.rotates_pairs:
        return [ColumnPart(name, start, num_plain + latent.rope_dim)]
    return [ColumnPart(name, start, num_plain), ColumnPart(name, first, half, step=2), ColumnPart(name, first + 1, half, step=2)]


def build_latent_backend(config: ModelConfig, num_heads: int, *, dtype: torch.dtype, device: torch.device) -> PagedLatentAttention:
    """Return the attention backend of a model with a ``latent``, for ``num_heads`` on this rank."""
    assert config.latent is not None
    factor = 1.0 if config.rope_scaling is None else config.rope_scaling.all_dims_factor
    scale = config.head_dim**-0.5 * factor**2
    return PagedLatentAttention(num_heads, config.latent, scale, dtype=dtype, device=device)
