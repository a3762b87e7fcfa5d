"""Workers that end in every way a process can, at the moment that a test asks for, and write down when that was."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import zspmd

MEMORY_MARGIN = 512 << 20  # room for the arena of another thread, and for what says that there was none


def _exhaust_memory() -> None:
    """Ask for more than a limit on the address space lets this process have."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_MARGIN, resource.RLIM_INFINITY))
    bytearray(4 * MEMORY_MARGIN)


def _raise() -> None:
    raise RuntimeError("this rank raises")


# By name: how a rank ends, and what its driver must report: an exit code, or the type of an exception.
WAYS: dict[str, tuple[Callable[[], object], int | str]] = {
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), -signal.SIGKILL),
    "SIGSEGV": (lambda: ctypes.string_at(0), -signal.SIGSEGV),
    "SIGABRT": (os.abort, -signal.SIGABRT),
    "os._exit": (lambda: os._exit(3), 3),
    "sys.exit": (lambda: sys.exit(4), 4),
    "out of memory": (_exhaust_memory, "builtins.MemoryError"),
    "raise": (_raise, "builtins.RuntimeError"),
}


def end(way: str, path: str) -> None:
    """Write the time to ``path`` and end this process."""
    Path(path).write_text(str(time.monotonic_ns()))
    WAYS[way][0]()


def ended_at(path: Path) -> float:
    """Return when ``end`` was called, on this machine's monotonic clock, in seconds."""
    return int(path.read_text()) / 1e9


class Doomed(zspmd.Worker):
    """Ends in its set-up, in a step, in a collective that its peers have entered, or in its teardown.

    Args:
        doom: {"rank", "way", "moment", "path", "delay_s"}; the last is how long the peers are left in the collective before.
    """

    def setup(self, *, doom: dict[str, Any]) -> None:
        print(f"rank {self.ctx.rank} sets up", flush=True)
        self.doom = doom
        if doom["moment"] == "collective":
            self.ctx.mesh["world"].barrier()
        self._end_at("setup")

    def step(self, inputs: Any) -> Any:
        if inputs == "doom":
            if self.doom["moment"] == "collective" and self.doom["rank"] == self.ctx.rank:
                time.sleep(self.doom["delay_s"])  # waits for nothing: peers are met at different depths of their collective
            self._end_at(self.doom["moment"])
        if self.doom["moment"] == "collective":
            self.ctx.mesh["world"].all_reduce(np.ones(4))
        return inputs

    def teardown(self) -> None:
        self._end_at("teardown")

    def _end_at(self, moment: str) -> None:
        if self.doom["moment"] == moment and self.doom["rank"] == self.ctx.rank:
            end(self.doom["way"], self.doom["path"])


def doom_on_import() -> None:
    """End this process if it is the rank that the environment names; called by modules that doom their import."""
    if "RANK" in os.environ and os.environ["RANK"] == os.environ.get("DOOMED_RANK"):
        end(os.environ["DOOMED_WAY"], os.environ["DOOMED_PATH"])
