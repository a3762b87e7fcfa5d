"""What config.json says of multi-head latent attention, and the tensors that follow. Standard library only.

Keys and values of all heads are made of one short vector a token, the latent, and keys have some dims more that are rotated and that
all heads share. Only latent and rotated dims are cached. Queries may come from a short vector of their own.

    hidden -- q_a -> norm -> q_b ----------------> queries      [heads, nope + rope]     (or q_proj alone)
    hidden -- kv_a -+-> norm -> latent -- kv_b --> keys, values [heads, nope], [heads, value]
                    +-> rotated dims ------------> keys         [rope], the same for all heads

    DeepseekV2ForCausalLM   dims are rotated in pairs of neighbours
    DeepseekV3ForCausalLM   the same, or halves against each other, as rope_interleave says
"""

from __future__ import annotations

from dataclasses import dataclass

from .config_fields import Fields
from .errors import CheckpointError
from .mixture_config import DEEPSEEK_V2, DEEPSEEK_V3

LATENTS = (DEEPSEEK_V2, DEEPSEEK_V3)
_MAX_DIM = 1 << 16


@dataclass(frozen=True)
class LatentConfig:
    """The sizes of a model's latent attention.

    Args:
        query_rank: numbers that the queries of all heads are made of; None where they come from the hidden state.
        rank: numbers of the latent.
        nope_dim: dims of a head of queries and keys that are not rotated.
        rope_dim: those that are.
        value_dim: dims of a head of values.
        rotates_pairs: in the checkpoint neighbouring dims are rotated against each other; else the halves.
    """

    query_rank: int | None
    rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    rotates_pairs: bool

    @property
    def head_dim(self) -> int:
        """Dims of a head of queries and keys."""
        return self.nope_dim + self.rope_dim

    @property
    def cached_size(self) -> int:
        """Numbers that are cached of a position in a layer, on each rank."""
        return self.rank + self.rope_dim


def read_latent(fields: Fields, architecture: str) -> LatentConfig:
    """Read the attention of one of ``LATENTS``.

    Raises:
        CheckpointError: a field that is missing or out of range, or a variant that is not supported; names it.
    """
    query_rank = None if fields.values.get("q_lora_rank") is None else fields.whole("q_lora_rank", high=_MAX_DIM)
    if query_rank is None and fields.flag("attention_bias"):
        raise CheckpointError(f"{fields.where}: attention_bias is true and q_lora_rank null; biases are supported with a q_lora_rank only")
    rope_dim = fields.whole("qk_rope_head_dim", high=_MAX_DIM)
    if rope_dim % 2:
        raise CheckpointError(f"{fields.where}: qk_rope_head_dim is {rope_dim}; rotary embedding needs an even one")
    return LatentConfig(
        query_rank=query_rank,
        rank=fields.whole("kv_lora_rank", high=_MAX_DIM),
        nope_dim=fields.whole("qk_nope_head_dim", high=_MAX_DIM),
        rope_dim=rope_dim,
        value_dim=fields.whole("v_head_dim", high=_MAX_DIM),
        rotates_pairs=architecture == DEEPSEEK_V2 or fields.flag("rope_interleave", True),
    )


def latent_shapes(latent: LatentConfig, num_heads: int, hidden_size: int, *, has_bias: bool) -> dict[str, tuple[int, ...]]:
    """Return the full shape of every tensor of one layer's attention, by its name within the layer."""
    q_rows, kv_rows = num_heads * latent.head_dim, num_heads * (latent.nope_dim + latent.value_dim)
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.kv_a_proj_with_mqa.weight": (latent.cached_size, hidden_size),
        "self_attn.kv_a_layernorm.weight": (latent.rank,),
        "self_attn.kv_b_proj.weight": (kv_rows, latent.rank),
        "self_attn.o_proj.weight": (hidden_size, num_heads * latent.value_dim),
    }
    if has_bias:
        shapes["self_attn.kv_a_proj_with_mqa.bias"], shapes["self_attn.o_proj.bias"] = (latent.cached_size,), (hidden_size,)
    if latent.query_rank is None:
        return {**shapes, "self_attn.q_proj.weight": (q_rows, hidden_size)}
    shapes["self_attn.q_a_proj.weight"] = (latent.query_rank, hidden_size)
    shapes["self_attn.q_a_layernorm.weight"] = (latent.query_rank,)
    shapes["self_attn.q_b_proj.weight"] = (q_rows, latent.query_rank)
    if has_bias:
        shapes["self_attn.q_a_proj.bias"] = (latent.query_rank,)
    return shapes
