"""The torch dtypes behind the names that a user gives."""

from __future__ import annotations

import torch

from ..errors import ConfigError

_TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(dtype: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """Return the torch dtype that a name of ``config.DTYPES`` stands for; "auto" is float32 on a CPU, the checkpoint's elsewhere."""
    if dtype == "auto":
        dtype = "float32" if device.type == "cpu" else checkpoint_dtype
    chosen = _TORCH_DTYPES.get(dtype)
    if chosen is None:
        raise ConfigError(f"dtype is {dtype!r}; choose one of auto, {', '.join(_TORCH_DTYPES)}")
    return chosen
