"""What the cgroup (v2) of this process, and those above it, allow."""

from __future__ import annotations

from pathlib import Path

_OWN = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def cgroup_limit(name: str) -> int | None:
    """Return the lowest limit, such as of "memory.max" or "pids.max"; None where there is none, or no cgroup v2."""
    limits = [int(text) for path in _files(name) if (text := path.read_text().strip()) != "max"]
    return min(limits, default=None)


def cgroup_cores() -> float | None:
    """Return how many cores' time "cpu.max" allows; None for no limit."""
    quotas = [path.read_text().split() for path in _files("cpu.max")]
    return min((int(quota) / int(period) for quota, period in quotas if quota != "max"), default=None)


def _files(name: str) -> list[Path]:
    """Return the files of that name from this process's own cgroup up to the root; a container sees its own as the root."""
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:  # a kernel without cgroups
        return []
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    folder = _ROOT / ("" if ".." in own else own.lstrip("/"))  # above the root that is mounted here, nothing can be read
    return [path / name for path in (folder, *folder.parents) if path.is_relative_to(_ROOT) and (path / name).is_file()]
