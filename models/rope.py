"""Rotary position embedding, with the frequency scalings of RopeScaling.

The halves of a head are rotated against each other (Hugging Face's layout, not the interleaved one):

    out = x * cos + roll(x, E / 2) * sin'       with sin' = (-sin, sin) over the two halves

T tokens, N heads, E head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..model_config import ModelConfig, RopeScaling


class RotaryEmbedding(nn.Module):
    """The rotation of each position, computed once a step and shared by all layers.

    Computed rather than looked up: a table for a context of a million positions would take half a gigabyte on every rank.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype = dtype
        frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        # cos is even and sin is odd, so negative frequencies in the first half give (-sin, sin) for free.
        self.frequencies = torch.cat((-frequencies, frequencies)).to(device)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin [T, 1, E] for ``positions`` int64 [T]; angles are float32 whatever the model's dtype."""
        angles = (positions[:, None] * self.frequencies)[:, None]
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def apply_rotation(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``heads`` [T, N, E] by what ``RotaryEmbedding`` returned for their tokens."""
    cos, signed_sin = rotation
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), signed_sin)


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Return the angular frequency of each pair of dims, float32 [head_dim / 2].

    llama3 leaves short wavelengths alone, divides long ones by ``factor`` and blends between; the formula is that of
    ``_compute_llama3_parameters`` in Transformers' modeling_rope_utils.py.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # full turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies
