"""The Llama family (Llama 2 and 3, Mistral, Qwen2, Qwen3) on one tensor-parallel rank; variants are fields of ModelConfig.

    token ids -> embedding -> [ + attention(norm) -> + mlp(norm) ] * layers -> norm -> hidden -> head -> logits of this rank's tokens
                 all-reduce       all-reduce      all-reduce

Heads, MLP width and vocabulary are split over the ranks; where there are fewer KV heads than ranks, rank r has a copy of KV head
r * num_kv_heads // tp, the one that its heads read.

T tokens, D model, H heads and K kv heads of this rank, E head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model_config import ModelConfig, check_tensor_parallel
from .attention import AttendLayer, AttentionBackend, AttentionInputs, SdpaAttention
from .communicator import Communicator
from .layers import ColumnParallelLinear, ColumnPart, RmsNorm, RowParallelLinear, ShardedModule, VocabParallelTable, WeightShard
from .rope import RotaryEmbedding, apply_rotation

Rotation = tuple[Tensor, Tensor]


class LlamaAttention(nn.Module):
    """Self-attention with one fused product for q, k and v."""

    def __init__(self, prefix: str, config: ModelConfig, communicator: Communicator, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        rank, size, head_dim = communicator.rank, communicator.size, config.head_dim
        self.num_heads = config.num_heads // size
        self.num_kv_heads = max(1, config.num_kv_heads // size)
        self.head_dim = head_dim
        q_part = (rank * self.num_heads * head_dim, self.num_heads * head_dim)
        kv_part = (rank * config.num_kv_heads // size * head_dim, self.num_kv_heads * head_dim)
        self.qkv = ColumnParallelLinear(
            [
                ColumnPart(f"{prefix}.q_proj", *q_part),
                ColumnPart(f"{prefix}.k_proj", *kv_part),
                ColumnPart(f"{prefix}.v_proj", *kv_part),
            ],
            config.hidden_size,
            bias=config.attention_bias,
            dtype=dtype,
            device=device,
        )
        self.output = RowParallelLinear(
            f"{prefix}.o_proj",
            config.num_heads * head_dim,
            config.hidden_size,
            communicator,
            bias=config.output_bias,
            dtype=dtype,
            device=device,
        )
        self.q_norm, self.k_norm = (
            RmsNorm(f"{prefix}.{name}", head_dim, config.rms_norm_eps, dtype=dtype, device=device) if config.qk_norm else None
            for name in ("q_norm", "k_norm")
        )

    def forward(self, x: Tensor, rotation: Rotation, attend: AttendLayer, cache: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, H + 2K, E]
        num_rotated = self.num_heads + self.num_kv_heads
        rotated, value = heads[:, :num_rotated], heads[:, num_rotated:]
        if self.q_norm is not None and self.k_norm is not None:
            query, key = rotated[:, : self.num_heads], rotated[:, self.num_heads :]
            rotated = torch.cat((self.q_norm(query), self.k_norm(key)), 1)
        rotated = apply_rotation(rotated, rotation)
        mixed = attend(rotated[:, : self.num_heads], rotated[:, self.num_heads :], value, cache)
        out: Tensor = self.output(mixed)
        return out


class LlamaMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) with one fused product for gate and up."""

    def __init__(self, prefix: str, config: ModelConfig, communicator: Communicator, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        num_rows = config.intermediate_size // communicator.size
        parts = [ColumnPart(f"{prefix}.{name}", communicator.rank * num_rows, num_rows) for name in ("gate_proj", "up_proj")]
        self.gate_up = ColumnParallelLinear(parts, config.hidden_size, bias=config.mlp_bias, dtype=dtype, device=device)
        self.down = RowParallelLinear(
            f"{prefix}.down_proj",
            config.intermediate_size,
            config.hidden_size,
            communicator,
            bias=config.mlp_bias,
            dtype=dtype,
            device=device,
        )

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate).mul_(up))
        return out


class LlamaLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual."""

    def __init__(self, prefix: str, config: ModelConfig, communicator: Communicator, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RmsNorm(f"{prefix}.input_layernorm", size, eps, dtype=dtype, device=device)
        self.attention = LlamaAttention(f"{prefix}.self_attn", config, communicator, dtype=dtype, device=device)
        self.mlp_norm = RmsNorm(f"{prefix}.post_attention_layernorm", size, eps, dtype=dtype, device=device)
        self.mlp = LlamaMlp(f"{prefix}.mlp", config, communicator, dtype=dtype, device=device)

    def forward(self, hidden: Tensor, rotation: Rotation, attend: AttendLayer, cache: Tensor) -> Tensor:
        attended: Tensor = self.attention(self.attention_norm(hidden), rotation, attend, cache)
        hidden = attended.add_(hidden)
        mixed: Tensor = self.mlp(self.mlp_norm(hidden))
        return mixed.add_(hidden)


class LlamaModel(nn.Module):
    """One rank's share of a causal language model; the ranks of ``communicator`` call it in step.

    Parameters have no values until ``load_weights`` fills them. Run it under ``torch.inference_mode``.

    Args:
        config: of the checkpoint.
        communicator: the tensor-parallel axis.
        dtype: of weights, activations and KV cache.
        device: where they live.

    Raises:
        TopologyError: the communicator's size does not fit the heads or the MLP.
    """

    def __init__(self, config: ModelConfig, communicator: Communicator, *, dtype: torch.dtype, device: torch.device) -> None:
        check_tensor_parallel(config, communicator.size)
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.device = device
        self.num_kv_heads = max(1, config.num_kv_heads // communicator.size)
        vocabulary = (config.vocab_size, config.hidden_size, communicator)
        self.embedding = VocabParallelTable("model.embed_tokens", *vocabulary, dtype=dtype, device=device)
        self.layers = nn.ModuleList(
            LlamaLayer(f"model.layers.{i}", config, communicator, dtype=dtype, device=device) for i in range(config.num_layers)
        )
        self.norm = RmsNorm("model.norm", config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        is_tied = config.tie_word_embeddings
        self.head = self.embedding if is_tied else VocabParallelTable("lm_head", *vocabulary, dtype=dtype, device=device)
        self.rotary = RotaryEmbedding(config, dtype=dtype, device=device)
        self.attention: AttentionBackend = SdpaAttention(self.num_kv_heads, sliding_window=config.sliding_window, dtype=dtype)
        self.vocab_start = self.head.start
        self.vocab_end = self.head.end

    def forward(self, token_ids: Tensor, inputs: AttentionInputs, kv_cache: Sequence[Tensor]) -> Tensor:
        """Run the packed tokens of a step, store their keys and values, and return their hidden states after the last norm.

        Args:
            token_ids: int64 [T], below the vocabulary's size; T is at least 1.
            inputs: where the tokens lie.
            kv_cache: what ``allocate_kv_cache`` returned.

        Returns:
            [T, D], the same on all ranks.
        """
        hidden = self.embedding.lookup(token_ids)
        rotation = self.rotary(inputs.positions)
        attend = self.attention.begin_step(inputs)
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            hidden = layer(hidden, rotation, attend, cache)
        out: Tensor = self.norm(hidden)
        return out

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [R, vocab_end - vocab_start] of rows ``hidden`` [R, D]: this rank's tokens, -inf for padding."""
        return self.head.project(hidden)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> list[Tensor]:
        """Return one tensor [2, num_blocks * block_size, K, E] a layer, keys then values.

        Zeroed, since padding reads slot 0: a NaN there would pass through a weight of zero.
        """
        shape = (2, num_blocks * block_size, self.num_kv_heads, self.config.head_dim)
        return [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in self.layers]

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Return the bytes that one block takes on this rank, over all its layers."""
        return len(self.layers) * 2 * block_size * self.num_kv_heads * self.config.head_dim * self.dtype.itemsize

    def shards(self) -> Iterator[WeightShard]:
        """Say which parts of the checkpoint fill which parameters of this rank."""
        for module in self.modules():
            if isinstance(module, ShardedModule):
                yield from module.shards()
