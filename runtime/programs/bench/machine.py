"""What a figure has to have beside it: processor, cores, load, and the versions of what was used."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

import zmq

_USED = ("zspmd", "pyzmq", "uvloop", "msgpack", "numpy", "torch", "transformers")


def machine_facts(others: Sequence[str] = ()) -> dict[str, Any]:
    """Return facts of this machine and the versions of what is installed, ``others`` beside what zspmd itself needs."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        "versions": {name: version for name in (*_USED, *others) if (version := installed_version(name)) is not None},
    }


def installed_version(name: str) -> str | None:
    """Return the version of a distribution without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """Return the processor's name as the kernel has it."""
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def load() -> float:
    """Return how many processes have wanted a core in the last minute, on average."""
    return round(os.getloadavg()[0], 2)
