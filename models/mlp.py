"""The gated MLP: of a dense layer, and of a shared expert.

T tokens, D model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .communicator import Communicator
from .layers import ColumnParallelLinear, ColumnPart, RowParallelLinear


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)) with one fused product for gate and up; each rank has a part of the width.

    Args:
        prefix: name of the MLP in the checkpoint.
        in_size: D.
        width: of all ranks together; the ranks must divide it.
        communicator: sums the ranks' parts.
        bias: whether the three linears have one.
        dtype: of the weights.
        device: where they live.
    """

    def __init__(
        self,
        prefix: str,
        in_size: int,
        width: int,
        communicator: Communicator,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        num_rows = width // communicator.size
        parts = [ColumnPart(f"{prefix}.{name}", communicator.rank * num_rows, num_rows) for name in ("gate_proj", "up_proj")]
        self.gate_up = ColumnParallelLinear(parts, in_size, bias=bias, dtype=dtype, device=device)
        self.down = RowParallelLinear(f"{prefix}.down_proj", width, in_size, communicator, bias=bias, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP of ``x`` [T, D], summed over the ranks."""
        gate, up = self.gate_up.forward(x).chunk(2, -1)
        return self.down.forward(F.silu(gate).mul_(up))

    def pack(self, input_scale: Tensor | None) -> None:
        """Pack both products; ``input_scale`` is for the first."""
        self.gate_up.pack(input_scale)
        self.down.pack()
