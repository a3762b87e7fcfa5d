"""What torch says of a machine, asked in a process of its own: no driver and no agent ever imports it."""

from __future__ import annotations

import json

from .check_records import FAIL, OK, WARN, Check

ASK_TORCH = """
import json, torch, torch.distributed as dist
print(json.dumps({
    "version": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available(),
    "devices": torch.cuda.device_count(), "gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(),
}))
"""
TORCH_S = 120.0


def judge_torch(exit_code: int, printed: str, errors: str, num_devices: int) -> Check:
    """Judge what a program of ``ASK_TORCH`` has printed, on a machine that shows so many CUDA devices."""
    if exit_code:
        last = (errors.strip().splitlines() or [f"exit code {exit_code}"])[-1]
        return Check("torch", FAIL, f"cannot be imported: {last}", "reinstall it: https://pytorch.org/get-started/locally")
    facts = json.loads(printed.strip().splitlines()[-1])
    cuda = f"CUDA {facts['cuda']}, {facts['devices']} devices" if facts["available"] else "no CUDA device"
    text = f"{facts['version']}, {cuda}, gloo {'yes' if facts['gloo'] else 'no'}, nccl {'yes' if facts['nccl'] else 'no'}"
    if num_devices and not facts["available"]:
        why = "has no CUDA in it: install a CUDA build" if facts["cuda"] is None else "finds no usable driver: see nvidia-smi"
        return Check("torch", WARN, text, f"this node has GPUs, and torch {why}")
    if not facts["gloo"]:
        return Check("torch", WARN, text, "scripts with the gloo backend and CPU ranks of several nodes need a build with gloo")
    return Check("torch", OK, text)


def slow_torch() -> Check:
    """What is said where it has not answered in time."""
    return Check("torch", FAIL, f"was not imported within {TORCH_S:g} s", "see where it hangs: python -X importtime -c 'import torch'")
