"""How much memory a process held at most, measured anew from a moment of one's choice."""

from __future__ import annotations

import os
import re


def reset_peak() -> int:
    """Have the kernel forget this process's peak; return what it holds now, in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Return the most that this process has held since the last ``reset_peak``, in bytes."""
    with open("/proc/self/status") as file:
        match = re.search(r"VmHWM:\s+([0-9]+) kB", file.read())
    assert match is not None
    return int(match[1]) << 10


def resident_bytes(pid: int | None = None) -> int:
    """Return what a process holds in memory now, in bytes; None is this one."""
    with open(f"/proc/{pid or 'self'}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
