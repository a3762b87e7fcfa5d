"""Which device each rank of a node computes on, found without torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError, TopologyError

_DEVICE_FILES = Path("/dev")
_DEVICE = re.compile(r"cpu|cuda:(0|[1-9][0-9]{0,3})")


def detect_devices(devices: str | Sequence[str], world_size: int) -> list[str]:
    """Return one device for each rank of this node: "cpu" or "cuda:<index among the visible ones>".

    Args:
        devices: "auto" takes CUDA devices where there are any and the CPU otherwise; "cpu" and "cuda" insist; a list, or a text
            such as "cuda:2,cuda:3", gives rank 0 its first entry and so on, and may name one device more than once.
        world_size: ranks on this node.

    Raises:
        ConfigError: an entry is no device name.
        TopologyError: more ranks than devices, or a device that is not there.
    """
    if devices == "auto":
        devices = "cuda" if num_cuda_devices() else "cpu"
    if devices == "cpu":
        return ["cpu"] * world_size
    if devices == "cuda":
        return _all_cuda(world_size)
    return _listed([entry.strip() for entry in devices.split(",")] if isinstance(devices, str) else list(devices), world_size)


def script_devices(devices: str, world_size: int) -> tuple[list[str], str | None]:
    """Return the device of each rank as the rank itself sees it, and its CUDA_VISIBLE_DEVICES: None to leave that as it is.

    A list of CUDA devices becomes what every rank sees, in rank order, so that the local rank indexes it. "auto" never fails: where
    there are fewer devices than ranks each is said to be on the CPU, and what the script does is its own affair.

    Raises:
        ConfigError: a device named twice, or "cpu" among CUDA devices.
        ConfigError, TopologyError: as ``detect_devices``.
    """
    if devices == "auto":
        is_cuda = world_size <= num_cuda_devices()
        return [f"cuda:{rank}" if is_cuda else "cpu" for rank in range(world_size)], None
    chosen = detect_devices(devices, world_size)
    if devices == "cuda":
        return chosen, None
    if set(chosen) == {"cpu"}:
        return chosen, ""
    if "cpu" in chosen:
        raise ConfigError(f"--devices {devices} mixes cpu and cuda; scripts find their device by LOCAL_RANK, so list CUDA devices only")
    if len(set(chosen)) < len(chosen):
        raise ConfigError(
            f"--devices {devices} names a device twice, which CUDA_VISIBLE_DEVICES cannot say; list each once, "
            "or leave --devices out and let the script choose"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if visible is None else [name.strip() for name in visible.split(",")]
    indices = [int(device.partition(":")[2]) for device in chosen]
    return [f"cuda:{rank}" for rank in range(world_size)], ",".join(str(i) if names is None else names[i] for i in indices)


def num_cuda_devices() -> int:
    """Return how many CUDA devices a process started now would see; touches no driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = sum(re.fullmatch(r"nvidia[0-9]+", entry.name) is not None for entry in _DEVICE_FILES.iterdir())
    if visible is None or not present:
        return present
    # CUDA reads the list up to its first invalid entry, and hides everything behind "-1".
    count = 0
    for entry in visible.split(","):
        if not entry.strip() or entry.strip().startswith("-"):
            break
        count += 1
    return count  # may exceed ``present``: parts of one GPU (MIG) count each


def available_cores() -> int:
    """Return the CPU cores that this process may use: its affinity, capped by the quota of its cgroup (v2); at least 1."""
    cores = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.is_file():
        quota, period = limit.read_text().split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def _all_cuda(world_size: int) -> list[str]:
    count = num_cuda_devices()
    if world_size > count:
        raise TopologyError(
            f"{world_size} ranks need {world_size} CUDA devices and this node shows {count}; lower the world size, "
            'check CUDA_VISIBLE_DEVICES, or set devices to "cpu" or to a list that names a device more than once'
        )
    return [f"cuda:{index}" for index in range(world_size)]


def _listed(entries: list[str], world_size: int) -> list[str]:
    if len(entries) < world_size:
        raise TopologyError(f"devices lists {len(entries)} entries ({', '.join(entries)}) for {world_size} ranks; list one per rank")
    count = num_cuda_devices()
    for entry in entries:
        match = _DEVICE.fullmatch(entry)
        if match is None:
            raise ConfigError(f'device {entry!r} is unknown; write "auto", "cpu", "cuda" or entries such as "cuda:0"')
        if match[1] is not None and int(match[1]) >= count:
            raise TopologyError(f"device {entry} is not there: this node shows {count} CUDA devices; check CUDA_VISIBLE_DEVICES")
    return entries[:world_size]
