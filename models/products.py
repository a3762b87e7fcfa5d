"""Products with a weight that never changes again, packed once into the form that the processor multiplies fastest.

Packed, a product takes half the time of ``F.linear`` from two rows on and, with AVX-512, gives a row the same bits whatever the other
rows are (but for a single row of 1,536 columns and more). Chosen by dtype and device alone, not by a measurement at the start: ranks
and replays must round alike. The operators are private to torch, which is why they are named here alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""x [R, in] -> [R, out]."""

_PACKED_ROWS = 16  # the R that the packed form is made for: as good as any other from 2 to 2,048, where one for R = 1 takes twice as long


def build_product(weight: Tensor, bias: Tensor | None, *, is_packed: bool) -> Product:
    """Return the function x -> x @ weight.T + bias.

    Args:
        weight: [out, in]. A packed product has its own copy, and does not see later changes.
        is_packed: whether to pack it, where ``can_pack`` says that this is possible.
    """
    if not (is_packed and can_pack(weight)):
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _PACKED_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN is here and multiplies matrices of this dtype on this processor; the same on all machines of a kind."""
    if weight.device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32
