"""The routed experts of one rank, whole, computed for all tokens that chose them in two products.

Tokens are sorted by copy (see ``expert_placement``), so that a copy's are rows one after another:

    choices [T, k] -> sorted -> rows [R, D] -> gate, up [R, 2 I] -> silu(gate) * up -> down [R, D] -> weighted, summed a token [T, D]

A token's result is made of its own rows alone, and their sum is taken in the order of its choices, wherever they lie among the rows.
Packed, it has the same bits whatever the other tokens are; otherwise its last bits can depend on how many rows an expert has, as in
a dense layer.

T tokens, k experts a token, R <= T * k rows, N copies on this rank, D model, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..expert_placement import Placement, copies_of_rank
from ..mixture_config import MixtureConfig, place_experts
from .expert_axis import ExpertAxis
from .group_products import GroupProduct, build_group_product
from .layers import ShardedModule, WeightShard, empty_parameter


class Experts(ShardedModule):
    """The experts that a placement gives this rank; the ranks' outputs are parts of a sum.

    Args:
        prefix: name of the mixture in the checkpoint.
        mixture: sizes, and how the experts are stored.
        in_size: D.
        axis: the one that the experts are spread over.
        placement: of this layer.
        dtype: of the weights.
        device: where they live.
    """

    def __init__(
        self,
        prefix: str,
        mixture: MixtureConfig,
        in_size: int,
        axis: ExpertAxis,
        placement: Placement,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.prefix = prefix
        self.mixture = mixture
        self.in_size = in_size
        self.dtype = dtype
        self.device = device
        self.axis = axis
        self.num_copies = len(placement)
        self.first = place_experts(len(placement), axis.rank, axis.size).start
        self.placed = copies_of_rank(placement, axis.rank, axis.size)
        # One expert's rows stand below another's, so that a shard fills rows as everywhere.
        self.gate_up, self.down = self._build_weights(len(self.placed))
        self.multiply_gate_up, self.multiply_down = self._build_products(is_packed=False)
        self.input_scale: Tensor | None = None
        self.numbers = torch.arange(len(self.placed), device=device)
        self.sum_of_ends = torch.zeros(len(self.placed), dtype=torch.int64, device=device)  # over all steps

    def pack(self, input_scale: Tensor | None) -> None:
        """Pack the weights, the columns of the first multiplied by ``input_scale`` [D] if there is one, and give up the originals."""
        self.input_scale = input_scale
        if input_scale is not None:
            self.gate_up.mul_(input_scale)
        self.multiply_gate_up, self.multiply_down = self._build_products(is_packed=True)
        del self.gate_up, self.down

    def shards(self) -> Iterator[WeightShard]:
        """Say where this rank's experts lie in the checkpoint."""
        return self._shards_of(self.placed, self.gate_up, self.down)

    def stage(self, placement: Placement, fill: Callable[[Iterator[WeightShard]], None]) -> Callable[[], None]:
        """Load what this rank lacks for another placement, and return the function that changes to it.

        That needs no more memory and reads no file: until it is called everything is as before.

        Args:
            placement: of as many copies as now.
            fill: fills shards from the checkpoint.
        """
        placed = copies_of_rank(placement, self.axis.rank, self.axis.size)
        new = [index for index, (before, expert) in enumerate(zip(self.placed, placed, strict=True)) if before != expert]
        gate_up, down = self._build_weights(len(new))
        fill(self._shards_of([placed[index] for index in new], gate_up, down))
        if self.input_scale is not None:
            gate_up.mul_(self.input_scale)
        puts = []
        for index, one_gate_up, one_down in zip(new, *self._apart(gate_up, down), strict=True):
            puts += [self.multiply_gate_up.stage(index, one_gate_up), self.multiply_down.stage(index, one_down)]

        def change() -> None:
            for put in puts:
                put()
            self.placed = placed

        return change

    def take_loads(self) -> list[int]:
        """Return how many tokens each expert of the layer has had on this rank since the last call."""
        loads = [0] * self.mixture.num_experts
        start = 0
        for expert, end in zip(self.placed, self.sum_of_ends.tolist()):
            loads[expert] += end - start
            start = end
        self.sum_of_ends.zero_()
        return loads

    def forward(self, x: Tensor, weights: Tensor, copies: Tensor) -> Tensor:
        """Return what this rank's experts add to each token.

        Args:
            x: [T, D].
            weights: float32 [T, k].
            copies: int64 [T, k], those of the experts that it goes to, on this rank or another.

        Returns:
            [T, D], zeros for a token that none of this rank's copies has.
        """
        num_tokens, top_k = copies.shape
        order, ends = self._sort(copies.flatten())
        if not len(order):
            return torch.zeros_like(x)
        if self.axis.size > 1:
            self.sum_of_ends.add_(ends)
        gate, up = self.multiply_gate_up(x.index_select(0, order // top_k), ends).chunk(2, -1)
        out = self.multiply_down(F.silu(gate).mul_(up), ends)
        weighted = out * weights.flatten().index_select(0, order)[:, None]  # float32 from here to the sum
        spread = weighted.new_zeros(num_tokens * top_k, self.in_size).index_copy_(0, order, weighted)
        return spread.view(num_tokens, top_k, -1).sum(1).to(x.dtype)

    def _sort(self, copies: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places in ``copies`` [T * k] that are this rank's, by copy, and where each copy's end, int32 [N]."""
        has_all = len(self.placed) == self.num_copies
        if not has_all:  # counted from this rank's first copy round to it, so that the other ranks' come last
            copies = (copies - self.first) % self.num_copies
        copies, order = copies.sort(stable=True)
        ends = torch.searchsorted(copies, self.numbers, right=True, out_int32=True)
        if not has_all:  # on a GPU the number of rows waits for the device
            order = order[: int(ends[-1]) if len(ends) else 0]
        return order, ends

    def _build_weights(self, count: int) -> tuple[nn.Parameter, nn.Parameter]:
        gate_up = empty_parameter(count * 2 * self.mixture.expert_size, self.in_size, dtype=self.dtype, device=self.device)
        return gate_up, empty_parameter(count * self.in_size, self.mixture.expert_size, dtype=self.dtype, device=self.device)

    def _apart(self, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Return both with an expert a row: [N, 2 I, D] and [N, D, I]."""
        width = self.mixture.expert_size
        return gate_up.view(-1, 2 * width, self.in_size), down.view(-1, self.in_size, width)

    def _build_products(self, *, is_packed: bool) -> tuple[GroupProduct, GroupProduct]:
        gate_up, down = self._apart(self.gate_up, self.down)
        return build_group_product(gate_up, is_packed=is_packed), build_group_product(down, is_packed=is_packed)

    def _shards_of(self, experts: Sequence[int], gate_up: nn.Parameter, down: nn.Parameter) -> Iterator[WeightShard]:
        """Say where ``experts`` lie in the checkpoint, to fill ``gate_up`` and ``down`` with them."""
        width, size, everything = self.mixture.expert_size, self.in_size, slice(None)
        for index, expert in enumerate(experts):
            start = index * 2 * width
            gate_rows, up_rows, both = slice(start, start + width), slice(start + width, start + 2 * width), slice(start, start + 2 * width)
            down_rows = slice(index * size, (index + 1) * size)
            if self.mixture.is_stacked:
                yield WeightShard(f"{self.prefix}.experts.gate_up_proj", gate_up, both, (expert, everything, everything))
                yield WeightShard(f"{self.prefix}.experts.down_proj", down, down_rows, (expert, everything, everything))
            else:
                names = (f"{self.prefix}.experts.{expert}.{name}.weight" for name in self.mixture.linear_names)
                for name, parameter, rows in zip(names, (gate_up, gate_up, down), (gate_rows, up_rows, down_rows), strict=True):
                    yield WeightShard(name, parameter, rows, (everything, everything))
