"""Rotary position embedding, with the frequency scalings of RopeScaling.

The halves of a head are rotated against each other (Hugging Face's layout, not the interleaved one):

    out = x * cos + roll(x, E / 2) * sin'       with sin' = (-sin, sin) over the two halves

T tokens, N heads, E dims of a head that are rotated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..model_config import ModelConfig
from ..rope_config import RopeScaling

_FIRST_POSITIONS = 1024


class RotaryEmbedding(nn.Module):
    """The rotation of each position, looked up once a step and shared by all layers.

    The table grows with the longest context that there was: one for a million positions would take half a gigabyte on every rank.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype = dtype
        self.factor = 1.0 if config.rope_scaling is None else config.rope_scaling.table_factor
        frequencies = rotary_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling)
        # cos is even and sin is odd, so negative frequencies in the first half give (-sin, sin) for free.
        self.frequencies = torch.cat((-frequencies, frequencies)).to(device)
        self.table = self._compute(_FIRST_POSITIONS)

    def forward(self, positions: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin [T, 1, E] for ``positions`` int64 [T], all below ``max_length``."""
        if max_length > len(self.table):
            self.table = self._compute(2 * max_length)
        cos, signed_sin = self.table.index_select(0, positions).chunk(2, 1)
        return cos, signed_sin

    def _compute(self, num_positions: int) -> Tensor:
        """Return [num_positions, 2, E], cos and signed sin; angles are float32 whatever the model's dtype."""
        angles = torch.arange(num_positions, device=self.frequencies.device)[:, None] * self.frequencies
        return torch.stack((angles.cos(), angles.sin()), 1).mul_(self.factor).to(self.dtype)


def rotate_(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
    """Rotate the first E dims of ``heads`` [T, N, dims] in place by what ``RotaryEmbedding`` returned for their tokens."""
    cos, signed_sin = rotation
    heads = heads[..., : cos.shape[-1]]  # GLM rotates a part of each head
    rolled = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(rolled, signed_sin)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return the angular frequency of each pair of dims, float32 [head_dim / 2].

    llama3 and yarn leave short wavelengths alone, divide long ones by ``factor`` and blend between; the formulas are those of
    ``_compute_llama3_parameters`` and ``_compute_yarn_parameters`` in Transformers' modeling_rope_utils.py.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        blend = _yarn_blend(head_dim, theta, scaling)
        return (1 - blend) * frequencies / scaling.factor + blend * frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # full turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn_blend(head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Return how much of each frequency is left as it is, float32 [head_dim / 2]: 1 below the dim that makes ``beta_fast`` turns."""

    def dim_of(turns: float) -> float:
        return head_dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncates:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001  # equal bounds: a step
    return 1 - ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
