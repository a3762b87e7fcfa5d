"""A mixture of experts over the ranks of one axis.

    x -> router -> experts of this rank --> + -> all-reduce -> out
    x -> shared expert, this rank's part ---^

Hidden states are the same on all ranks of the axis, so each routes every token, computes what its own experts add to it, and one
all-reduce sums the ranks' parts, the shared expert's among them: what a dense MLP costs in collectives. Experts stay whole; their
number need not divide evenly, and a rank may have none. Where replicas share the experts, ``ExpertAxis`` has their tokens brought
to them first, and the parts back.

T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..expert_placement import Placement
from ..mixture_config import MixtureConfig
from ..model_config import ModelConfig
from .communicator import Communicator
from .expert_axis import ExpertAxis
from .expert_copies import ExpertCopies
from .experts import Experts
from .layers import ColumnParallelLinear, ColumnPart, WeightShard
from .mlp import GatedMlp
from .routing import Router


def build_mlp(
    config: ModelConfig, layer: int, communicator: Communicator, axis: ExpertAxis, *, dtype: torch.dtype, device: torch.device
) -> GatedMlp | Mixture:
    """Return what a layer has behind its attention: a mixture where ``config`` says so, else an MLP."""
    prefix, size, mixture = f"model.layers.{layer}", config.hidden_size, config.mixture_of(layer)
    if mixture is not None:
        placement = axis.placement(layer, mixture.num_experts)
        return Mixture(f"{prefix}.{mixture.block_name}", mixture, size, communicator, axis, placement, dtype=dtype, device=device)
    return GatedMlp(f"{prefix}.mlp", size, config.intermediate_size, communicator, bias=config.mlp_bias, dtype=dtype, device=device)


class Mixture(nn.Module):
    """The MLP of a mixture layer.

    Args:
        prefix: name of the mixture in the checkpoint.
        mixture: of the model.
        in_size: D.
        communicator: the tensor-parallel axis, over which the shared expert is spread.
        axis: that of the experts.
        placement: of the experts' copies.
        dtype: of the experts' weights.
        device: where they live.
    """

    def __init__(
        self,
        prefix: str,
        mixture: MixtureConfig,
        in_size: int,
        communicator: Communicator,
        axis: ExpertAxis,
        placement: Placement,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.communicator = communicator
        self.axis = axis
        self.router = Router(f"{prefix}.gate", mixture, in_size, device=device)
        self.copies = ExpertCopies(placement, mixture.num_experts, device)
        self.experts = Experts(prefix, mixture, in_size, axis, placement, dtype=dtype, device=device)
        self.shared = SharedExpert(prefix, mixture, in_size, communicator, dtype=dtype, device=device) if mixture.shared_size else None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer adds to tokens ``x`` [T, D], summed over the ranks; T is 0 only where replicas share the experts."""
        out = self.axis.run(x, self._route, self.experts.forward)
        if not len(x):
            return out
        if self.shared is not None:
            out.add_(self.shared.forward(x))
        return self.communicator.all_reduce(out) if self.communicator.size > 1 else out

    def _route(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        weights, experts = self.router.forward(x)
        return weights, self.copies.choose(experts, first)

    def stage(self, placement: Placement, fill: Callable[[Iterator[WeightShard]], None]) -> Callable[[], None]:
        """Load what another placement asks for, and return the function that changes to it, as ``Experts.stage``."""
        copies = ExpertCopies(placement, self.experts.mixture.num_experts, self.experts.device)
        change_experts = self.experts.stage(placement, fill)

        def change() -> None:
            change_experts()
            self.copies = copies

        return change

    def pack(self, input_scale: Tensor | None) -> None:
        """Pack all products.

        Args:
            input_scale: [D], by what the inputs must be multiplied from now on, if by anything.
        """
        self.router.score.pack(input_scale)
        self.experts.pack(input_scale)
        if self.shared is not None:
            self.shared.pack(input_scale)


class SharedExpert(nn.Module):
    """The expert that takes every token, its width spread over the ranks; returns this rank's part of the sum."""

    def __init__(
        self,
        prefix: str,
        mixture: MixtureConfig,
        in_size: int,
        communicator: Communicator,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        name = f"{prefix}.{mixture.shared_name}"
        self.mlp = GatedMlp(name, in_size, mixture.shared_size, PartialSums(communicator), bias=False, dtype=dtype, device=device)
        gate = [ColumnPart(f"{name}_gate", 0, 1)]
        self.gate = ColumnParallelLinear(gate, in_size, bias=False, dtype=dtype, device=device) if mixture.has_shared_gate else None

    def pack(self, input_scale: Tensor | None) -> None:
        """Pack the products; ``input_scale`` is for those that take the input."""
        self.mlp.pack(input_scale)
        if self.gate is not None:
            self.gate.pack(input_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's part of the output for ``x`` [T, D]."""
        out = self.mlp.forward(x)
        return out if self.gate is None else out.mul_(self.gate.forward(x).sigmoid_())


class PartialSums:
    """An axis whose row-parallel linears keep their part of the sum, for one all-reduce of several parts together."""

    def __init__(self, communicator: Communicator) -> None:
        self.rank = communicator.rank
        self.size = communicator.size
        self._communicator = communicator

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` as it is."""
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors, as the axis itself does."""
        return self._communicator.all_gather(tensor)
