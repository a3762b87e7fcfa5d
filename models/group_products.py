"""Products of rows with one of several weights, the rows of each weight one after another.

Three ways, chosen once for all weights of a group:

    packed      each weight in oneDNN's form (see ``products``); half to two thirds of the time of the others on a CPU
    grouped     torch's grouped product: one kernel for all weights on a GPU; on a CPU the loop below without its Python
    one by one  a plain product a weight, where torch has no grouped one: it takes no rows that are not a multiple of 16 bytes

R rows, N weights, A columns in, B columns out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import Product, build_product, can_pack

_ALIGNMENT = 16  # bytes
_MIN_CUDA_CAPABILITY = (8, 0)


class GroupProduct(ABC):
    """(rows [R, A], ends int32 [N]) -> [R, B]: weight n multiplies the rows from ends[n - 1] to ends[n]; the last end is R."""

    @abstractmethod
    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Multiply rows, of which there must be one at least."""

    @abstractmethod
    def stage(self, index: int, weight: Tensor) -> Callable[[], None]:
        """Return the function that puts ``weight`` [B, A] in the place of one of the group's; it needs no more memory."""


def build_group_product(weights: Tensor, *, is_packed: bool) -> GroupProduct:
    """Return the product with ``weights`` [N, B, A].

    Args:
        weights: a packed product has its own copy of them, and does not see later changes.
        is_packed: whether to pack them, where ``can_pack`` says that this is possible.
    """
    if is_packed and can_pack(weights):
        return PackedGroup([build_product(weight, None, is_packed=True) for weight in weights])
    return TorchGroup(weights) if has_grouped_product(weights) else PlainGroup(weights)


def has_grouped_product(weights: Tensor) -> bool:
    """Whether torch has a grouped product for these sizes on this device."""
    if not hasattr(F, "grouped_mm") or any(size * weights.element_size() % _ALIGNMENT for size in weights.shape[1:]):
        return False
    return weights.device.type != "cuda" or torch.cuda.get_device_capability(weights.device) >= _MIN_CUDA_CAPABILITY


class PackedGroup(GroupProduct):
    """Each weight a packed product."""

    def __init__(self, products: Sequence[Product]) -> None:
        self._products = list(products)

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        parts, start = [], 0
        for product, end in zip(self._products, ends.tolist()):
            if end > start:
                parts.append(product(rows[start:end]))
                start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def stage(self, index: int, weight: Tensor) -> Callable[[], None]:
        product = build_product(weight, None, is_packed=True)

        def put() -> None:
            self._products[index] = product

        return put


class PlainGroup(GroupProduct):
    """A product a weight."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        out = rows.new_empty(rows.shape[0], self._weights.shape[1])
        start = 0
        for weight, end in zip(self._weights, ends.tolist()):
            if end > start:
                torch.mm(rows[start:end], weight.t(), out=out[start:end])
                start = end
        return out

    def stage(self, index: int, weight: Tensor) -> Callable[[], None]:
        def put() -> None:
            self._weights[index].copy_(weight)

        return put


class TorchGroup(PlainGroup):
    """One product for all weights."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__(weights)
        self._transposed = weights.transpose(1, 2)

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(rows, self._transposed, offs=ends)
