"""Products of rows with one of several weights, the rows of each weight one after another.

Three ways, chosen once a weight:

    packed      each weight in oneDNN's form (see ``products``); half to two thirds of the time of the others on a CPU
    grouped     torch's grouped product: one kernel for all weights on a GPU; on a CPU the loop below without its Python
    one by one  a plain product a weight, where torch has no grouped one: it takes no rows that are not a multiple of 16 bytes

R rows, N weights, A columns in, B columns out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import Product, build_product, can_pack

GroupProduct = Callable[[Tensor, Tensor], Tensor]
"""(rows [R, A], ends int32 [N]) -> [R, B]: weight n multiplies the rows from ends[n - 1] to ends[n]; the last end is R."""

_ALIGNMENT = 16  # bytes
_MIN_CUDA_CAPABILITY = (8, 0)


def build_group_product(weights: Tensor, *, is_packed: bool) -> GroupProduct:
    """Return the function that multiplies rows by ``weights`` [N, B, A].

    Args:
        weights: a packed product has its own copy of them, and does not see later changes.
        is_packed: whether to pack them, where ``can_pack`` says that this is possible.
    """
    if is_packed and can_pack(weights):
        products = [build_product(weight, None, is_packed=True) for weight in weights]
        return lambda rows, ends: multiply_packed(rows, products, ends)
    if has_grouped_product(weights):
        transposed = weights.transpose(1, 2)
        return lambda rows, ends: F.grouped_mm(rows, transposed, offs=ends)
    return lambda rows, ends: multiply_one_by_one(rows, weights, ends)


def has_grouped_product(weights: Tensor) -> bool:
    """Whether torch has a grouped product for these sizes on this device."""
    if not hasattr(F, "grouped_mm") or any(size * weights.element_size() % _ALIGNMENT for size in weights.shape[1:]):
        return False
    return weights.device.type != "cuda" or torch.cuda.get_device_capability(weights.device) >= _MIN_CUDA_CAPABILITY


def multiply_packed(rows: Tensor, products: Sequence[Product], ends: Tensor) -> Tensor:
    """Multiply the rows of each packed weight; there must be at least one row."""
    parts, start = [], 0
    for product, end in zip(products, ends.tolist()):
        if end > start:
            parts.append(product(rows[start:end]))
            start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def multiply_one_by_one(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each weight that has some."""
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    start = 0
    for weight, end in zip(weights, ends.tolist()):
        if end > start:
            torch.mm(rows[start:end], weight.t(), out=out[start:end])
            start = end
    return out
