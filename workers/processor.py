"""What a rank computes on, as far as the last bits of its results depend on it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def describe_processor(device: torch.device) -> str:
    """Return a GPU's name, or a CPU's with its vector instructions and the threads of this process: products split their sums by both."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _CPUINFO.read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, threads: {torch.get_num_threads()}"
