"""What the model worker asks of a model; ``LlamaModel`` and ``TransformersModel`` have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from ..model_sizes import ModelSizes
from .attention import AttentionInputs, KvLayer
from .expert_axis import ExpertAxis
from .layers import WeightShard


class CausalModel(Protocol):
    """One rank's share of a causal language model; ``LlamaModel`` says what each method does."""

    @property
    def config(self) -> ModelSizes:
        """The sizes of the whole model."""

    @property
    def layers(self) -> nn.ModuleList:
        """The layers of ours on this stage."""

    @property
    def expert_axis(self) -> ExpertAxis:
        """The ranks that share experts."""

    @property
    def vocab_start(self) -> int:
        """The first of this rank's tokens; on the last stage."""

    @property
    def vocab_end(self) -> int:
        """One past its last, padding included."""

    def forward(self, token_ids: Tensor, inputs: AttentionInputs, kv_cache: Sequence[KvLayer], hidden: Tensor | None = None) -> Tensor:
        """Run the packed tokens of a step and return their hidden states [T, D]."""

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [R, vocab_end - vocab_start] of rows ``hidden`` [R, D]."""

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> list[KvLayer]:
        """Return the cache of each layer."""

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Return the bytes that one block takes on this rank, over all its layers."""

    def pack_weights(self) -> None:
        """Put the weights into the form that products are fastest with."""

    def serve_experts(self) -> None:
        """Take part in a step in which this replica computes nothing."""

    def shards(self) -> Iterator[WeightShard]:
        """Say which parts of the checkpoint fill which parameters of this rank."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield each parameter once."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with names."""
