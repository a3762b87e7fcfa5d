"""Layers that hold one rank's part of a weight and know which part of the checkpoint fills it.

    column parallel     rank r has some output rows      no communication
    row parallel        rank r has some input columns    one all-reduce
    vocabulary          rank r has vocab_start..vocab_end, padded so that all ranks have as many rows

Once loaded, linears can be packed (see ``products``), which frees the weights: the ``pack`` of each takes them out of the module.
Modules call each other's ``forward`` by name: what nn.Module does around it takes longer than a small kernel.

T tokens, R rows, D model, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .communicator import Communicator
from .products import Product, build_product


@dataclass(frozen=True)
class WeightShard:
    """One part of a checkpoint tensor and the rows of a parameter that it fills.

    Args:
        name: the tensor's name in the checkpoint.
        parameter: what is filled.
        rows: which of its rows.
        source: the part of the checkpoint tensor, a slice or an index a dim; None fills the rows with zeros (padding of the vocabulary).
    """

    name: str
    parameter: nn.Parameter
    rows: slice
    source: tuple[slice | int, ...] | None


class ShardedModule(nn.Module, ABC):
    """A module with weights of its own; together its shards fill each of its parameters exactly once."""

    @abstractmethod
    def shards(self) -> Iterator[WeightShard]:
        """Say which parts of the checkpoint fill this rank's parameters."""


def empty_parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Return a parameter without values, to be filled by the loader; inference needs no gradient."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class RmsNorm(ShardedModule):
    """x / sqrt(mean(x**2) + eps) * weight over the last dim; replicated on all ranks.

    ``fold`` hands the weight to the product that follows, which is packed anyway: two kernels fewer.
    """

    def __init__(self, name: str, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.weight = empty_parameter(size, dtype=dtype, device=device)
        self.root_size = math.sqrt(size)
        self.root_eps = torch.tensor(math.sqrt(eps), dtype=torch.float32, device=device)
        self.is_folded = False

    def shards(self) -> Iterator[WeightShard]:
        yield WeightShard(f"{self.name}.weight", self.weight, slice(0, self.weight.shape[0]), (slice(None),))

    def fold(self) -> Tensor | None:
        """Leave the weight out from now on and return by what the inputs of the next product must be multiplied instead, [size].

        None, and nothing changes, where one kernel does it all (GPUs), or where the products would be rounded otherwise (halves).
        """
        if self.weight.dtype != torch.float32 or self.weight.device.type != "cpu":
            return None
        self.is_folded = True
        self.root_eps *= self.root_size  # x / sqrt(sum(x**2) + size * eps)
        return self.weight * self.root_size

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        # On a CPU F.rms_norm is seven kernels and a good part of a small model's step; hypot(a, b) = sqrt(a**2 + b**2) makes five.
        if self.is_folded:
            return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.root_eps)
        scale = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True).div_(self.root_size), self.root_eps)
        return (x / scale).mul_(self.weight)


@dataclass(frozen=True)
class ColumnPart:
    """Rows of the checkpoint's linear ``name``: ``num_rows`` of them from ``start`` on, every ``step``-th."""

    name: str
    start: int
    num_rows: int
    step: int = 1

    @property
    def source(self) -> slice:
        """Where they lie in the checkpoint's tensor."""
        return slice(self.start, self.start + (self.num_rows - 1) * self.step + 1, self.step)


class ColumnParallelLinear(ShardedModule):
    """One matrix product for several linears of the same input; the output has the parts' rows one after another."""

    def __init__(self, parts: Sequence[ColumnPart], in_size: int, *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.parts = tuple(parts)
        num_rows = sum(part.num_rows for part in parts)
        self.weight = empty_parameter(num_rows, in_size, dtype=dtype, device=device)
        self.bias = empty_parameter(num_rows, dtype=dtype, device=device) if bias else None
        self.multiply: Product = build_product(self.weight, self.bias, is_packed=False)

    def pack(self, input_scale: Tensor | None) -> None:
        """Pack the weight, each of its columns multiplied by ``input_scale`` [in_size] if there is one, and give up the original."""
        weight = self.weight if input_scale is None else self.weight * input_scale
        self.multiply = build_product(weight, self.bias, is_packed=True)
        del self.weight

    def shards(self) -> Iterator[WeightShard]:
        at = 0
        for part in self.parts:
            rows = slice(at, at + part.num_rows)
            yield WeightShard(f"{part.name}.weight", self.weight, rows, (part.source, slice(None)))
            if self.bias is not None:
                yield WeightShard(f"{part.name}.bias", self.bias, rows, (part.source,))
            at += part.num_rows

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)


class RowParallelLinear(ShardedModule):
    """A linear whose input is split over the ranks; the partial products are summed, then the bias is added once."""

    def __init__(
        self,
        name: str,
        in_size: int,
        out_size: int,
        communicator: Communicator,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.name = name
        self.communicator = communicator
        local_size = in_size // communicator.size
        self.columns = slice(communicator.rank * local_size, (communicator.rank + 1) * local_size)
        self.weight = empty_parameter(out_size, local_size, dtype=dtype, device=device)
        self.bias = empty_parameter(out_size, dtype=dtype, device=device) if bias else None
        self.multiply: Product = build_product(self.weight, None, is_packed=False)

    def pack(self) -> None:
        """Pack the weight and give up the original."""
        self.multiply = build_product(self.weight, None, is_packed=True)
        del self.weight

    def shards(self) -> Iterator[WeightShard]:
        rows = slice(0, self.weight.shape[0])
        yield WeightShard(f"{self.name}.weight", self.weight, rows, (slice(None), self.columns))
        if self.bias is not None:
            yield WeightShard(f"{self.name}.bias", self.bias, rows, (slice(None),))

    def forward(self, x: Tensor) -> Tensor:
        out = self.multiply(x)
        if self.communicator.size > 1:
            out = self.communicator.all_reduce(out)
        return out if self.bias is None else out.add_(self.bias)


class VocabParallelTable(ShardedModule):
    """One row for each token of the vocabulary: the embedding, the head, or both where they are tied.

    The vocabulary is padded to a multiple of the ranks; padding rows are zero and lie at its end.
    """

    def __init__(
        self, name: str, vocab_size: int, size: int, communicator: Communicator, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.name = name
        self.communicator = communicator
        num_rows = -(-vocab_size // communicator.size)
        self.start = communicator.rank * num_rows
        self.end = self.start + num_rows
        self.num_tokens = max(0, min(num_rows, vocab_size - self.start))  # rows that are no padding
        self.weight = empty_parameter(num_rows, size, dtype=dtype, device=device)
        self.multiply: Product = build_product(self.weight, None, is_packed=False)

    def pack(self, input_scale: Tensor | None, *, keeps_rows: bool) -> None:
        """Pack the weight for ``project``, as ``ColumnParallelLinear.pack`` does.

        Args:
            keeps_rows: keep the original too, for ``lookup``: the table then takes twice its memory.
        """
        weight = self.weight if input_scale is None else self.weight * input_scale
        self.multiply = build_product(weight, None, is_packed=True)
        if not keeps_rows:
            del self.weight

    def shards(self) -> Iterator[WeightShard]:
        name, tokens = f"{self.name}.weight", self.num_tokens
        if tokens:
            yield WeightShard(name, self.weight, slice(0, tokens), (slice(self.start, self.start + tokens), slice(None)))
        if tokens < self.end - self.start:
            yield WeightShard(name, self.weight, slice(tokens, self.end - self.start), None)

    def lookup(self, token_ids: Tensor) -> Tensor:
        """Return the rows [T, D] of ``token_ids`` int64 [T], which must be below the vocabulary's size."""
        if self.communicator.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.start
        is_elsewhere = (local < 0) | (local >= self.end - self.start)
        rows = F.embedding(local.masked_fill_(is_elsewhere, 0), self.weight).masked_fill_(is_elsewhere[:, None], 0)
        return self.communicator.all_reduce(rows)

    def project(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [R, V_local] of ``hidden`` [R, D] for this rank's tokens; -inf for padding."""
        logits = self.multiply(hidden).float()
        if self.num_tokens < logits.shape[1]:
            logits[:, self.num_tokens :] = -torch.inf
        return logits
