"""Processor time and wake-ups of processes, as the kernel counts them thread by thread."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence


class Meter:
    """Adds up what the threads of some processes have used, the threads that they have when it is made.

    Args:
        pids: of this user's processes; one that ends counts up to its last reading no more.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._threads: list[str] = []
        for pid in pids:
            with contextlib.suppress(FileNotFoundError):
                self._threads += [f"/proc/{pid}/task/{thread}" for thread in os.listdir(f"/proc/{pid}/task")]

    def read(self) -> tuple[float, int]:
        """Return microseconds of processor time and voluntary switches since the threads began."""
        spent_ns = switches = 0
        for thread in self._threads:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"{thread}/schedstat") as stat:
                    spent_ns += int(stat.read().split()[0])
                with open(f"{thread}/status") as status:
                    switches += next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt"))
        return spent_ns / 1000, switches
