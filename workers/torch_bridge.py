"""Torch tensors for the codec, over shared memory with NumPy; torch is imported when the first tensor passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..transport.codec import BFLOAT16, TORCH, AnyArray, register_bridge

if TYPE_CHECKING:
    import torch


class TorchBridge:
    """The codec's ``TensorBridge`` for torch. Tensors arrive on the CPU, detached; treat them as read-only."""

    def matches(self, value: object) -> bool:
        return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "data_ptr")

    def to_array(self, tensor: torch.Tensor) -> AnyArray:
        import torch

        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if plain.dtype == torch.bfloat16:
            return plain.view(torch.uint16).numpy().view(BFLOAT16)
        array: AnyArray = plain.numpy()
        return array

    def from_array(self, array: AnyArray) -> torch.Tensor:
        import torch

        owned: Any = array if array.flags.writeable else array.copy()  # torch has no read-only tensors
        if owned.dtype == BFLOAT16:
            return torch.from_numpy(owned.view("<u2")).view(torch.bfloat16)
        return torch.from_numpy(owned)


def register_torch() -> None:
    """Let torch tensors travel to and from this process as tensors; ranks have called it before ``setup``."""
    register_bridge(TORCH, TorchBridge())
