"""The Llama family on one tensor-parallel rank; its variants (Llama 2 and 3, Mistral, Qwen2, Qwen3, mixtures, DeepSeek) are fields of
ModelConfig.

    token ids -> embedding -> [ + attention(norm) -> + mlp(norm) ] * layers -> norm -> hidden -> head -> logits of this rank's tokens
                 all-reduce       all-reduce      all-reduce

Heads, MLP width and vocabulary are split over the ranks; where there are fewer KV heads than ranks, rank r has a copy of KV head
r * num_kv_heads // tp, the one that its heads read.

T tokens, D model, H heads and K kv heads of this rank, E head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..model_config import ModelConfig, check_tensor_parallel
from .attention import AttendLayer, AttentionBackend, AttentionInputs, KvLayer, PagedAttention
from .communicator import Communicator
from .deepseek import DeepseekAttention, build_latent_backend
from .expert_axis import ExpertAxis
from .latent_attention import LatentLayer
from .latent_expansion import LatentExpansion
from .layers import ColumnParallelLinear, ColumnPart, RmsNorm, RowParallelLinear, ShardedModule, VocabParallelTable, WeightShard
from .moe import Mixture, build_mlp
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

    def __init__(
        self, index: int, config: ModelConfig, communicator: Communicator, axis: ExpertAxis, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        prefix, size, eps = f"model.layers.{index}", config.hidden_size, config.rms_norm_eps
        self.attention_norm = RmsNorm(f"{prefix}.input_layernorm", size, eps, dtype=dtype, device=device)
        attention = LlamaAttention if config.latent is None else DeepseekAttention
        self.attention = attention(f"{prefix}.self_attn", config, communicator, dtype=dtype, device=device)
        self.mlp_norm = RmsNorm(f"{prefix}.post_attention_layernorm", size, eps, dtype=dtype, device=device)
        self.mlp = build_mlp(config, index, communicator, axis, dtype=dtype, device=device)

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
        layers: those of this rank's pipeline stage; None stands for all. The first stage embeds, the last has norm and head.
        expert_axis: the ranks that the experts are spread over; None stands for those of ``communicator``.

    Raises:
        TopologyError: the communicator's size does not fit the heads or the MLP.
    """

    def __init__(
        self,
        config: ModelConfig,
        communicator: Communicator,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layers: range | None = None,
        expert_axis: ExpertAxis | None = None,
    ) -> None:
        check_tensor_parallel(config, communicator.size)
        super().__init__()
        layers = range(config.num_layers) if layers is None else layers
        is_first, is_last = layers.start == 0, layers.stop == config.num_layers
        self.config = config
        self.dtype = dtype
        self.device = device
        self.num_heads = config.num_heads // communicator.size
        self.num_kv_heads = max(1, config.num_kv_heads // communicator.size)
        build_table = functools.partial(
            VocabParallelTable,
            vocab_size=config.vocab_size,
            size=config.hidden_size,
            communicator=communicator,
            dtype=dtype,
            device=device,
        )
        self.embedding = build_table("model.embed_tokens") if is_first else None
        self.expert_axis = expert_axis or ExpertAxis(communicator)
        own_layers = [LlamaLayer(i, config, communicator, self.expert_axis, dtype=dtype, device=device) for i in layers]
        self.layers = nn.ModuleList(own_layers)
        self._run_layers = [layer.forward for layer in own_layers]
        self.norm = RmsNorm("model.norm", config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device) if is_last else None
        self.head: VocabParallelTable | None = None
        if is_last:
            is_shared = config.tie_word_embeddings and self.embedding is not None
            self.head = self.embedding if is_shared else build_table("model.embed_tokens" if config.tie_word_embeddings else "lm_head")
        self.rotary = RotaryEmbedding(config, dtype=dtype, device=device)
        self.attention = self._build_attention()

    def _build_attention(self) -> AttentionBackend:
        config = self.config
        if config.latent is not None:
            return build_latent_backend(config, self.num_heads, dtype=self.dtype, device=self.device)
        return PagedAttention(
            self.num_heads,
            self.num_kv_heads,
            config.head_dim,
            len(self.layers),
            sliding_window=config.sliding_window,
            dtype=self.dtype,
            device=self.device,
        )

    def forward(self, token_ids: Tensor, inputs: AttentionInputs, kv_cache: Sequence[KvLayer], hidden: Tensor | None = None) -> Tensor:
        """Run the packed tokens of a step, store their keys and values, and return their hidden states: on the last stage after the norm.

        Args:
            token_ids: int64 [T], below the vocabulary's size; T is at least 1. Only the first stage reads them.
            inputs: where the tokens lie.
            kv_cache: what ``allocate_kv_cache`` returned.
            hidden: [T, D], what the stage before returned; None on the first.

        Returns:
            [T, D], the same on all ranks of the stage.
        """
        if hidden is None:
            assert self.embedding is not None, "only the first stage embeds"
            hidden = self.embedding.lookup(token_ids)
        rotation = self.rotary.forward(inputs.positions, inputs.max_length)
        attend = self.attention.begin_step(inputs)
        for run_layer, cache in zip(self._run_layers, kv_cache, strict=True):
            hidden = run_layer(hidden, rotation, attend, cache)
        return hidden if self.norm is None else self.norm.forward(hidden)

    def serve_experts(self) -> None:
        """Take part in a step in which this replica computes nothing, where other replicas need its experts."""
        nothing = torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self.device)
        for layer in self.layers:
            if isinstance(layer.mlp, Mixture):
                layer.mlp.forward(nothing)

    @property
    def vocab_start(self) -> int:
        """The first of this rank's tokens; on the last stage."""
        return self._head.start

    @property
    def vocab_end(self) -> int:
        return self._head.end

    @property
    def _head(self) -> VocabParallelTable:
        assert self.head is not None, "only the last stage has the head"
        return self.head

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [R, vocab_end - vocab_start] of rows ``hidden`` [R, D] of the last stage: this rank's tokens, -inf for
        padding.
        """
        return self._head.project(hidden)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> list[KvLayer]:
        """Return the cache of each layer."""
        if self.config.latent is not None:
            expansions = [module for module in self.modules() if isinstance(module, LatentExpansion)]  # of each layer, in order
            return [LatentLayer(num_blocks, block_size, expansion, dtype=self.dtype, device=self.device) for expansion in expansions]
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
        if self.head is not None and self.norm is not None:
            self.head.pack(self.norm.fold(), keeps_rows=self.head is self.embedding)

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Return the bytes that one block takes on this rank, over all its layers."""
        latent = self.config.latent
        numbers = 2 * self.num_kv_heads * self.config.head_dim if latent is None else latent.cached_size  # of a position in a layer
        return len(self.layers) * block_size * numbers * self.dtype.itemsize

    def shards(self) -> Iterator[WeightShard]:
        """Say which parts of the checkpoint fill which parameters of this rank."""
        for module in self.modules():
            if isinstance(module, ShardedModule):
                yield from module.shards()
