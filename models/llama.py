"""The Llama family on one tensor-parallel rank; its variants (Llama 2 and 3, Mistral, Qwen2, Qwen3, mixtures) are fields of ModelConfig.

    token ids -> embedding -> [ + attention(norm) -> + mlp(norm) ] * layers -> norm -> hidden -> head -> logits of this rank's tokens
                 all-reduce       all-reduce      all-reduce

Heads, MLP width and vocabulary are split over the ranks; where there are fewer KV heads than ranks, rank r has a copy of KV head
r * num_kv_heads // tp, the one that its heads read.

T tokens, D model, H heads and K kv heads of this rank, E head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..model_config import ModelConfig, check_tensor_parallel
from .attention import AttendLayer, AttentionBackend, AttentionInputs, KvLayer, PagedAttention
from .communicator import Communicator
from .layers import ColumnParallelLinear, ColumnPart, RmsNorm, RowParallelLinear, ShardedModule, VocabParallelTable, WeightShard
from .moe import build_mlp
from .rope import RotaryEmbedding, rotate_

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

    def forward(self, x: Tensor, rotation: Rotation, attend: AttendLayer, cache: KvLayer) -> Tensor:
        """Return what attention adds to the rows ``x`` [T, D], whose keys and values are stored in ``cache``."""
        heads = self.qkv.forward(x).view(len(x), -1, self.head_dim)  # [T, H + 2K, E]
        query, keys_values = heads[:, : self.num_heads], heads[:, self.num_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            query.copy_(self.q_norm.forward(query))
            key = keys_values[:, : self.num_kv_heads]
            key.copy_(self.k_norm.forward(key))
        rotate_(heads[:, : self.num_heads + self.num_kv_heads], rotation)
        return self.output.forward(attend(query, keys_values, cache))

    def pack(self, input_scale: Tensor | None) -> None:
        """Pack both products; ``input_scale`` is for the first."""
        self.qkv.pack(input_scale)
        self.output.pack()


class LlamaLayer(nn.Module):
    """Attention and MLP, or a mixture of experts in its place, each behind a norm and added to the residual."""

    def __init__(self, index: int, config: ModelConfig, communicator: Communicator, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        prefix, size, eps = f"model.layers.{index}", config.hidden_size, config.rms_norm_eps
        self.attention_norm = RmsNorm(f"{prefix}.input_layernorm", size, eps, dtype=dtype, device=device)
        self.attention = LlamaAttention(f"{prefix}.self_attn", config, communicator, dtype=dtype, device=device)
        self.mlp_norm = RmsNorm(f"{prefix}.post_attention_layernorm", size, eps, dtype=dtype, device=device)
        self.mlp = build_mlp(config, index, communicator, dtype=dtype, device=device)

    def forward(self, hidden: Tensor, rotation: Rotation, attend: AttendLayer, cache: KvLayer) -> Tensor:
        hidden = self.attention.forward(self.attention_norm.forward(hidden), rotation, attend, cache).add_(hidden)
        return self.mlp.forward(self.mlp_norm.forward(hidden)).add_(hidden)

    def pack(self) -> None:
        """Pack the layer's products, with the norms before them."""
        self.attention.pack(self.attention_norm.fold())
        self.mlp.pack(self.mlp_norm.fold())


class LlamaModel(nn.Module):
    """One rank's share of a causal language model; the ranks of ``communicator`` call it in step.

    Parameters have no values until ``load_weights`` fills them; ``pack_weights`` is called after that, if at all. Run it under
    ``torch.inference_mode``.

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
        layers = [LlamaLayer(i, config, communicator, dtype=dtype, device=device) for i in range(config.num_layers)]
        self.layers = nn.ModuleList(layers)
        self._run_layers = [layer.forward for layer in layers]
        self.norm = RmsNorm("model.norm", config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)
        is_tied = config.tie_word_embeddings
        self.head = self.embedding if is_tied else VocabParallelTable("lm_head", *vocabulary, dtype=dtype, device=device)
        self.rotary = RotaryEmbedding(config, dtype=dtype, device=device)
        self.attention: AttentionBackend = PagedAttention(
            config.num_heads // communicator.size,
            self.num_kv_heads,
            config.head_dim,
            config.num_layers,
            sliding_window=config.sliding_window,
            dtype=dtype,
            device=device,
        )
        self.vocab_start = self.head.start
        self.vocab_end = self.head.end

    def forward(self, token_ids: Tensor, inputs: AttentionInputs, kv_cache: Sequence[KvLayer]) -> Tensor:
        """Run the packed tokens of a step, store their keys and values, and return their hidden states after the last norm.

        Args:
            token_ids: int64 [T], below the vocabulary's size; T is at least 1.
            inputs: where the tokens lie.
            kv_cache: what ``allocate_kv_cache`` returned.

        Returns:
            [T, D], the same on all ranks.
        """
        hidden = self.embedding.lookup(token_ids)
        rotation = self.rotary.forward(inputs.positions, inputs.max_length)
        attend = self.attention.begin_step(inputs)
        for run_layer, cache in zip(self._run_layers, kv_cache, strict=True):
            hidden = run_layer(hidden, rotation, attend, cache)
        return self.norm.forward(hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [R, vocab_end - vocab_start] of rows ``hidden`` [R, D]: this rank's tokens, -inf for padding."""
        return self.head.project(hidden)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> list[KvLayer]:
        """Return the cache of each layer."""
        shape = (num_blocks, self.num_kv_heads, block_size, self.config.head_dim)
        return [KvLayer(*shape, dtype=self.dtype, device=self.device) for _ in self.layers]

    @torch.inference_mode()
    def pack_weights(self) -> None:
        """Put the weights into the form that products are fastest with, one after another, and free the originals.

        Afterwards the model cannot be loaded again. A head that shares its table with the embedding gets a copy.
        """
        for layer in self.layers:
            assert isinstance(layer, LlamaLayer)
            layer.pack()
        self.head.pack(self.norm.fold(), keeps_rows=self.head is self.embedding)

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Return the bytes that one block takes on this rank, over all its layers."""
        return len(self.layers) * 2 * block_size * self.num_kv_heads * self.config.head_dim * self.dtype.itemsize

    def shards(self) -> Iterator[WeightShard]:
        """Say which parts of the checkpoint fill which parameters of this rank."""
        for module in self.modules():
            if isinstance(module, ShardedModule):
                yield from module.shards()
