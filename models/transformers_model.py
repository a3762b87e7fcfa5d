"""A model without a module of ours: Transformers' own modelling code on one rank, with our linears, paged attention and communicator.

    token ids -> [ Transformers' embedding, layers, norm ] -> hidden -> [ Transformers' head ] -> logits of this rank's tokens
                   |         |         '- other stages' layers pass on          |
                   whole     |                                           VocabHead, by tokens
                             linears by the tensor-parallel plan, attention through ``transformers_attention``

Rows of a step, whatever sequences they are of, go through as one batch entry. Only attention may look from one row at another, which
is tried out before the first request (``transformers_trial``). It is slower than a module of ours: small kernels, none of them fused.

T tokens, R rows, D model, E head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..errors import InternalError
from ..transformers_config import TransformersConfig, check_foreign_tensor_parallel
from .attention import AttentionBackend, AttentionInputs, KvLayer, PagedAttention
from .communicator import Communicator
from .expert_axis import ExpertAxis
from .layers import ColumnParallelLinear, RowParallelLinear, ShardedModule, WeightShard, empty_parameter
from .transformers_architecture import build_architecture, build_buffers, name_tensors
from .transformers_attention import PAGED, STEP, HeadShare, PagedStep, Trial
from .transformers_linear import VocabHead, shard_linears
from .transformers_stage import cut_stage
from .transformers_trial import try_attention, try_rows


class TransformersModel(nn.Module):
    """One rank's share of a model of Transformers; the ranks of ``communicator`` call it in step. A ``CausalModel``.

    Args:
        config: of the checkpoint.
        directory: the checkpoint.
        communicator: the tensor-parallel axis.
        dtype: of weights, activations and KV cache.
        device: where they live.
        layers: those of this rank's pipeline stage; None stands for all.

    Raises:
        CheckpointError: Transformers has no such model, or zspmd cannot run it.
        TopologyError: the ranks do not divide what they share.
    """

    def __init__(
        self,
        config: TransformersConfig,
        directory: Path,
        communicator: Communicator,
        *,
        dtype: torch.dtype,
        device: torch.device,
        layers: range | None = None,
    ) -> None:
        check_foreign_tensor_parallel(config, communicator.size)
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, device
        self.communicator = communicator
        self.stage = range(config.num_layers) if layers is None else layers
        self.layers = nn.ModuleList()  # those of ours, whose experts could be moved: none
        self.expert_axis = ExpertAxis(communicator)
        size = communicator.size
        self.heads = HeadShare(config.num_heads // size, config.num_kv_heads // size, config.head_dim, communicator.rank, size)
        whole: Any = build_architecture(config, directory)
        self._tensor_names = name_tensors(whole, directory)
        self._prefix: str = whole.base_model_prefix
        settings = whole.config
        self.base: Any = whole.base_model
        self._entry = cut_stage(self.base, self.stage, settings.base_model_pp_plan)
        shard_linears(self.base, f"{self._prefix}.", settings.base_model_tp_plan, communicator, dtype=dtype, device=device)
        build_buffers(whole, device)
        _give_memory(self.base, dtype=dtype, device=device)
        self.head: VocabHead | None = None
        if self.stage.stop == config.num_layers:
            self.head = self._build_head(whole)
            setattr(whole, self._prefix, _HiddenStates())
            self._head_model = whole
        self._windows: list[int | None] = []
        self._backends: dict[int | None, AttentionBackend] = {}

    def _build_head(self, whole: Any) -> VocabHead:
        linear = whole.get_output_embeddings()
        name = next(name for name, module in whole.named_modules() if module is linear)
        embedding = self.base.get_input_embeddings() if self.stage.start == 0 else None
        shared = None
        if whole.config.tie_word_embeddings and self.communicator.size == 1 and embedding is not None:
            shared = embedding.weight
        head = VocabHead(name, linear, self.communicator, shared=shared, dtype=self.dtype, device=self.device)
        whole.set_output_embeddings(head)
        return head

    def forward(self, token_ids: Tensor, inputs: AttentionInputs, kv_cache: Sequence[KvLayer], hidden: Tensor | None = None) -> Tensor:
        """Run the packed tokens of a step, as ``LlamaModel.forward`` does; ``allocate_kv_cache`` comes before."""
        attends = {window: backend.begin_step(inputs) for window, backend in self._backends.items()}
        step = PagedStep(self.heads, self.stage.start, self._windows, attends, kv_cache)
        return self._run(token_ids, inputs.positions, hidden, step)

    def _run(self, token_ids: Tensor, positions: Tensor, hidden: Tensor | None, step: PagedStep | Trial) -> Tensor:
        if self._entry is None:
            given = {"input_ids": token_ids[None]}
        else:
            if hidden is None:
                raise InternalError("a later stage was given no hidden states")
            # What the model makes of the embeddings before its first layer is dropped there.
            self._entry.received = hidden[None]
            given = {"inputs_embeds": hidden[None]}
        out: Tensor = self.base(**given, position_ids=positions[None], use_cache=False, **{STEP: step}).last_hidden_state
        return out[0]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [R, vocab_end - vocab_start] of ``hidden`` [R, D], -inf for padding, as the model's own code has them."""
        logits: Tensor = self._head_model(inputs_embeds=hidden[None], use_cache=False).logits[0].float()
        own = self._own_head
        if not own.is_gathered and own.num_tokens < logits.shape[1]:
            logits[:, own.num_tokens :] = -torch.inf
        return logits

    @torch.inference_mode()
    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> list[KvLayer]:
        """Try the model out and return the cache of each layer; the ranks of the stage call it together, once the weights are there.

        Raises:
            CheckpointError: the model asks for an attention that is not ours, or mixes rows of different sequences.
        """
        self._windows = try_attention(self)
        self._backends = {window: self._build_backend(window) for window in dict.fromkeys(self._windows)}
        try_rows(self)
        return self.build_cache(num_blocks, block_size)

    def build_cache(self, num_blocks: int, block_size: int) -> list[KvLayer]:
        """Return an empty cache of each layer."""
        shape = (num_blocks, self.heads.num_kv_heads, block_size, self.heads.head_dim)
        return [KvLayer(*shape, dtype=self.dtype, device=self.device) for _ in self.stage]

    def _build_backend(self, window: int | None) -> AttentionBackend:
        return PagedAttention(
            self.heads.num_heads,
            self.heads.num_kv_heads,
            self.heads.head_dim,
            self._windows.count(window),
            sliding_window=window,
            dtype=self.dtype,
            device=self.device,
        )

    def run_trial(self, token_ids: Tensor, positions: Tensor, hidden: Tensor | None, trial: Trial, implementation: str) -> None:
        """Run the model with another attention in place of the paged one."""
        self.base.config._attn_implementation = implementation
        try:
            self._run(token_ids, positions, hidden, trial)
        finally:
            self.base.config._attn_implementation = PAGED

    @property
    def vocab_start(self) -> int:
        """The first of this rank's tokens; on the last stage."""
        return self._own_head.start

    @property
    def vocab_end(self) -> int:
        return self._own_head.end

    @property
    def _own_head(self) -> VocabHead:
        if self.head is None:
            raise InternalError("only the last stage has the head")
        return self.head

    @torch.inference_mode()
    def pack_weights(self) -> None:
        """Pack the linears, as ``LlamaModel.pack_weights`` does."""
        for module in self.base.modules():
            if isinstance(module, ColumnParallelLinear):
                module.pack(None)
            elif isinstance(module, RowParallelLinear):
                module.pack()
        if self.head is not None:
            self.head.pack(None, keeps_rows=self.head.is_shared)

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Return the bytes that one block takes on this rank, over all its layers."""
        return len(self.stage) * 2 * block_size * self.heads.num_kv_heads * self.heads.head_dim * self.dtype.itemsize

    def serve_experts(self) -> None:
        """Do nothing: no replica shares experts with another."""

    def shards(self) -> Iterator[WeightShard]:
        """Say which parts of the checkpoint fill which parameters of this rank."""
        for shard in self._own_shards():
            yield replace(shard, name=self._tensor_names[shard.name])

    def _own_shards(self) -> Iterator[WeightShard]:
        for path, module in self.base.named_modules(prefix=self._prefix):
            if isinstance(module, ShardedModule):
                yield from module.shards()
                continue
            for name, parameter in module.named_parameters(recurse=False):
                whole = (slice(None),) * parameter.dim()
                yield WeightShard(f"{path}.{name}", parameter, slice(0, parameter.shape[0]), whole)
        if self.head is not None:
            yield from self.head.shards()


class _HiddenStates(nn.Module):
    """Stands for the base model where only what comes after it is wanted."""

    def forward(self, input_ids: None = None, *, inputs_embeds: Tensor, **_others: Any) -> Any:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def _give_memory(base: nn.Module, *, dtype: torch.dtype, device: torch.device) -> None:
    """Replace the parameters that are still on the meta device by ones without values, to be filled by the loader."""
    replaced: dict[int, nn.Parameter] = {}
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta:
                if id(parameter) not in replaced:
                    replaced[id(parameter)] = empty_parameter(*parameter.shape, dtype=dtype, device=device)
                module.register_parameter(name, replaced[id(parameter)])
