"""The routed experts of one rank, whole, computed for all tokens that chose them in two products.

Tokens are sorted by expert, so that an expert's are rows one after another:

    choices [T, k] -> sorted -> rows [R, D] -> gate, up [R, 2 I] -> silu(gate) * up -> down [R, D] -> weighted, summed a token [T, D]

A token's result is made of its own rows alone, and their sum is taken in the order of its choices, wherever they lie among the rows.
Packed, it has the same bits whatever the other tokens are; otherwise its last bits can depend on how many rows an expert has, as in
a dense layer.

T tokens, k experts a token, R <= T * k rows, N experts of this rank, D model, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mixture_config import MixtureConfig, place_experts
from .expert_axis import ExpertAxis
from .group_products import GroupProduct, build_group_product
from .layers import ShardedModule, WeightShard, empty_parameter


class Experts(ShardedModule):
    """The experts that ``place_experts`` gives this rank; the ranks' outputs are parts of a sum.

    Args:
        prefix: name of the mixture in the checkpoint.
        mixture: sizes, and how the experts are stored.
        in_size: D.
        axis: the one that the experts are spread over.
        dtype: of the weights.
        device: where they live.
    """

    def __init__(
        self,
        prefix: str,
        mixture: MixtureConfig,
        in_size: int,
        axis: ExpertAxis,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.mixture = mixture
        self.in_size = in_size
        self.placed = place_experts(mixture.num_experts, axis.rank, axis.size)
        count = len(self.placed)
        # One expert's rows stand below another's, so that a shard fills rows as everywhere.
        self.gate_up = empty_parameter(count * 2 * mixture.expert_size, in_size, dtype=dtype, device=device)
        self.down = empty_parameter(count * in_size, mixture.expert_size, dtype=dtype, device=device)
        self.multiply_gate_up, self.multiply_down = self._build_products(is_packed=False)
        self.numbers = torch.arange(count, device=device)

    def pack(self, input_scale: Tensor | None) -> None:
        """Pack the weights, the columns of the first multiplied by ``input_scale`` [D] if there is one, and give up the originals."""
        if input_scale is not None:
            self.gate_up.mul_(input_scale)
        self.multiply_gate_up, self.multiply_down = self._build_products(is_packed=True)
        del self.gate_up, self.down

    def _build_products(self, *, is_packed: bool) -> tuple[GroupProduct, GroupProduct]:
        count, width = len(self.placed), self.mixture.expert_size
        gate_up, down = self.gate_up.view(count, 2 * width, self.in_size), self.down.view(count, self.in_size, width)
        return build_group_product(gate_up, is_packed=is_packed), build_group_product(down, is_packed=is_packed)

    def shards(self) -> Iterator[WeightShard]:
        """Say where this rank's experts lie in the checkpoint."""
        width, size, everything = self.mixture.expert_size, self.in_size, slice(None)
        for index, expert in enumerate(self.placed):
            start = index * 2 * width
            gate, up, both = slice(start, start + width), slice(start + width, start + 2 * width), slice(start, start + 2 * width)
            down = slice(index * size, (index + 1) * size)
            if self.mixture.is_stacked:
                yield WeightShard(f"{self.prefix}.experts.gate_up_proj", self.gate_up, both, (expert, everything, everything))
                yield WeightShard(f"{self.prefix}.experts.down_proj", self.down, down, (expert, everything, everything))
            else:
                names = (f"{self.prefix}.experts.{expert}.{name}.weight" for name in self.mixture.linear_names)
                for name, parameter, rows in zip(names, (self.gate_up, self.gate_up, self.down), (gate, up, down), strict=True):
                    yield WeightShard(name, parameter, rows, (everything, everything))

    def forward(self, x: Tensor, weights: Tensor, choices: Tensor) -> Tensor:
        """Return what this rank's experts add to each token.

        Args:
            x: [T, D].
            weights: float32 [T, k].
            choices: int64 [T, k], the experts, this rank's or another's.

        Returns:
            [T, D], zeros for a token that none of this rank's experts has.
        """
        num_tokens, top_k = choices.shape
        order, ends = self._sort(choices.flatten())
        if not len(order):
            return torch.zeros_like(x)
        gate, up = self.multiply_gate_up(x.index_select(0, order // top_k), ends).chunk(2, -1)
        out = self.multiply_down(F.silu(gate).mul_(up), ends)
        weighted = out * weights.flatten().index_select(0, order)[:, None]  # float32 from here to the sum
        spread = weighted.new_zeros(num_tokens * top_k, self.in_size).index_copy_(0, order, weighted)
        return spread.view(num_tokens, top_k, -1).sum(1).to(x.dtype)

    def _sort(self, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places in ``choices`` [T * k] that are this rank's, by expert, and where each expert's end, int32 [N]."""
        has_all = len(self.placed) == self.mixture.num_experts
        if not has_all:  # counted from this rank's first expert round to it, so that the other ranks' come last
            choices = (choices - self.placed.start) % self.mixture.num_experts
        experts, order = choices.sort(stable=True)
        ends = torch.searchsorted(experts, self.numbers, right=True, out_int32=True)
        if not has_all:  # on a GPU the number of rows waits for the device
            order = order[: int(ends[-1]) if len(ends) else 0]
        return order, ends
