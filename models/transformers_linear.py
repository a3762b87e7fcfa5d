"""Linears of Transformers' models replaced by ours, each with this rank's part of the weight, as the model's tensor-parallel plan says.

    colwise                     some of the outputs                 no communication
    colwise_gather_output       the same, and all ranks get all     one all-gather
    rowwise                     some of the inputs                  one all-reduce
    rowwise_split_input         the same, of inputs that are whole  one all-reduce
    replicate, or not named     the whole weight

T tokens, D model, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, TopologyError
from .communicator import Communicator
from .layers import ColumnParallelLinear, ColumnPart, RowParallelLinear, ShardedModule, VocabParallelTable, WeightShard, empty_parameter

_COLUMN, _ROW = ("colwise", "colwise_gather_output", "colwise_rep"), ("rowwise", "rowwise_split_input", "rowwise_rep")
_WHOLE = ("replicate", "replicated_with_grad_allreduce")


class GatheredLinear(ColumnParallelLinear):
    """A column-parallel linear whose outputs all ranks get whole."""

    def __init__(self, part: ColumnPart, in_size: int, communicator: Communicator, *, bias: bool, dtype: torch.dtype, device: torch.device):
        super().__init__([part], in_size, bias=bias, dtype=dtype, device=device)
        self.communicator = communicator

    def forward(self, x: Tensor) -> Tensor:
        return self.communicator.all_gather(super().forward(x)).movedim(0, -2).flatten(-2)  # [size, ..., rows] -> [..., size * rows]


class SplitInputLinear(RowParallelLinear):
    """A row-parallel linear that takes its own columns of inputs that are whole, or inputs that have these alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.shape[-1] == self.columns.stop - self.columns.start else x[..., self.columns])


class VocabHead(VocabParallelTable):
    """The head as a module: logits of this rank's tokens, as the model's own code goes on with them.

    Args:
        shared: the embedding's weight where it is the head's too, which the embedding loads.
    """

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        communicator: Communicator,
        *,
        shared: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(name, linear.out_features, linear.in_features, communicator, dtype=dtype, device=device)
        self.is_shared = shared is not None
        if shared is not None:
            self.weight = shared
            self.multiply = lambda x: nn.functional.linear(x, shared)
        self.bias = empty_parameter(self.end - self.start, dtype=dtype, device=device) if linear.bias is not None else None
        self.is_gathered = False  # whether to return the logits of all ranks; only to see that this changes nothing

    def shards(self) -> Iterator[WeightShard]:
        """Say which rows are this rank's, of the bias too; none of a weight that the embedding loads."""
        if not self.is_shared:
            yield from super().shards()
        if self.bias is not None:
            name, tokens = f"{self.name}.bias", self.num_tokens
            if tokens:
                yield WeightShard(name, self.bias, slice(0, tokens), (slice(self.start, self.start + tokens),))
            if tokens < self.end - self.start:
                yield WeightShard(name, self.bias, slice(tokens, self.end - self.start), None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [..., V_local] of ``hidden`` [..., D]; what padding gets means nothing."""
        logits = self.multiply(hidden)
        logits = logits if self.bias is None else logits + self.bias
        if not self.is_gathered:
            return logits
        return self.communicator.all_gather(logits).movedim(0, -2).flatten(-2)


def shard_linears(
    module: nn.Module, prefix: str, plan: Mapping[str, str], communicator: Communicator, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Replace every ``nn.Linear`` below ``module``.

    Args:
        prefix: of the module's names in the model, with a dot at its end.
        plan: styles by name below the module, with ``*`` for the number of a layer.
        dtype, device: of the new weights.

    Raises:
        CheckpointError: a style that is not supported, with more than one rank.
        TopologyError: the ranks do not divide a linear that they share.
    """
    styles = [(re.compile(re.escape(pattern).replace(r"\*", r"\d+")), style) for pattern, style in plan.items()]
    for name, child in list(module.named_modules()):
        style = next((style for pattern, style in styles if pattern.fullmatch(name)), "replicate")
        if communicator.size > 1 and style not in (*_COLUMN, *_ROW, *_WHOLE):
            raise CheckpointError(
                f"Transformers plans {prefix}{name} as {style!r} for tensor parallelism, which is not supported; use tp 1 (and pp)"
            )
        if isinstance(child, nn.Linear):
            new = _build_linear(f"{prefix}{name}", child, style, communicator, dtype=dtype, device=device)
            module.get_submodule(name.rpartition(".")[0]).register_module(name.rpartition(".")[2], new)


def _build_linear(
    name: str, linear: nn.Linear, style: str, communicator: Communicator, *, dtype: torch.dtype, device: torch.device
) -> ShardedModule:
    rows, columns, has_bias = linear.out_features, linear.in_features, linear.bias is not None
    if communicator.size == 1 or style in _WHOLE:
        return ColumnParallelLinear([ColumnPart(name, 0, rows)], columns, bias=has_bias, dtype=dtype, device=device)
    shared = rows if style in _COLUMN else columns
    if shared % communicator.size:
        raise TopologyError(
            f"tp {communicator.size} does not divide the {shared} dims of {name} that its ranks share; choose a tp that does"
        )
    if style in _ROW:
        kind = RowParallelLinear if style == "rowwise" else SplitInputLinear
        return kind(name, columns, rows, communicator, bias=has_bias, dtype=dtype, device=device)
    own = rows // communicator.size
    part = ColumnPart(name, communicator.rank * own, own)
    if style == "colwise":
        return ColumnParallelLinear([part], columns, bias=has_bias, dtype=dtype, device=device)
    return GatheredLinear(part, columns, communicator, bias=has_bias, dtype=dtype, device=device)
