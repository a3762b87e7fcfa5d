"""What config.json says of rotary position embedding: theta, how many dims of a head are rotated, and scaling for long contexts.

    default   none
    linear    all frequencies divided by ``factor``
    llama3    the low ones divided, the high ones left, a blend between
    yarn      the same with other bounds, and cos and sin are multiplied by a number, see arXiv 2309.00071

Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config_fields import Fields, shown
from .errors import CheckpointError

_PART = "partial_rotary_factor"


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    Args:
        kind: "linear", "llama3" or "yarn".
        factor: what a frequency is divided by at most.
        low_freq_factor, high_freq_factor: llama3's bounds, in turns within the original context.
        original_max_position_embeddings: the original context; of llama3 and yarn.
        beta_fast, beta_slow: yarn's bounds, in turns within the original context.
        truncates: yarn's bounds are rounded to whole dims.
        table_factor: yarn's cos and sin are multiplied by it.
        all_dims_factor: DeepSeek multiplies queries and keys by it, all dims of them (its ``mscale_all_dim``).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncates: bool = True
    table_factor: float = 1.0
    all_dims_factor: float = 1.0


def read_rope(fields: Fields, head_dim: int, *, theta: float, part: float | None) -> tuple[int, float, RopeScaling | None]:
    """Return how many dims of a head are rotated, theta and the scaling.

    Transformers 5 writes one object ``rope_parameters``; older files have ``rope_theta`` beside ``rope_scaling``.

    Args:
        fields: of config.json.
        head_dim: dims of a head that may be rotated.
        theta: where the file has none.
        part: of ``head_dim`` that is rotated where the file does not say it; None where all of it must be.

    Raises:
        CheckpointError: a field that is missing or out of range, or a kind of scaling that is not supported; names it.
    """
    rope = fields.object("rope_parameters" if fields.values.get("rope_parameters") is not None else "rope_scaling")
    theta = rope.number("rope_theta", fields.number("rope_theta", theta))
    rotary_dim = _read_rotary_dim(fields, rope, head_dim, part)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return rotary_dim, theta, None
    if kind == "linear":
        return rotary_dim, theta, RopeScaling("linear", rope.number("factor"))
    if kind == "llama3":
        return rotary_dim, theta, _read_llama3(rope)
    if kind == "yarn":
        if theta <= 1:
            raise CheckpointError(f"{rope.where}: rope_theta is {theta}; yarn needs one above 1")
        return rotary_dim, theta, _read_yarn(rope, fields.whole("max_position_embeddings"))
    raise CheckpointError(f"{rope.where}: rope_type is {shown(kind)}; supported are default, linear, llama3, yarn")


def _read_rotary_dim(fields: Fields, rope: Fields, head_dim: int, part: float | None) -> int:
    factor = rope.number(_PART, fields.number(_PART, 1.0 if part is None else part))
    if factor == 1:
        return head_dim
    rotary_dim = int(head_dim * min(factor, 2.0))
    if part is None or not 2 <= rotary_dim < head_dim or rotary_dim % 2:
        wanted = "only 1 is supported" if part is None else f"an even number of a head's {head_dim} dims must be rotated"
        raise CheckpointError(f"{fields.where}: {_PART} is {factor}; {wanted}")
    return rotary_dim


def _read_llama3(rope: Fields) -> RopeScaling:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if not low < high:
        raise CheckpointError(f"{rope.where}: low_freq_factor {low} must be below high_freq_factor {high}")
    return RopeScaling("llama3", rope.number("factor"), low, high, rope.whole("original_max_position_embeddings"))


def _read_yarn(rope: Fields, max_positions: int) -> RopeScaling:
    factor = rope.number("factor")
    scale, all_dims_scale = _read_or_0(rope, "mscale"), _read_or_0(rope, "mscale_all_dim")
    table_factor = _yarn_factor(factor, 1.0)
    if scale and all_dims_scale:
        table_factor = _yarn_factor(factor, scale) / _yarn_factor(factor, all_dims_scale)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=rope.whole("original_max_position_embeddings", max_positions),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncates=rope.flag("truncate", True),
        table_factor=rope.number("attention_factor", table_factor),
        all_dims_factor=_yarn_factor(factor, all_dims_scale),
    )


def _read_or_0(rope: Fields, name: str) -> float:
    """Return a number of at least 0, which like a missing one means that the file does without it."""
    return 0.0 if rope.values.get(name) in (None, 0) else rope.number(name)


def _yarn_factor(factor: float, scale: float) -> float:
    """YaRN's temperature for a context that is ``factor`` times as long."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
