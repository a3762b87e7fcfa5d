"""A worker that times the collectives of its mesh, for ``zspmd-run bench collective``."""

from __future__ import annotations

import time
from typing import Any

import torch

from .worker import Worker, rpc

_WARM_UP = 20


class CollectiveTimer(Worker):
    """Does a collective many times over and says how long each took on this rank."""

    def setup(self) -> None:
        """Leave the cores to the ranks."""
        torch.set_num_threads(1)

    @rpc
    def time_collective(self, operation: str, size: int, count: int, limit_s: float) -> list[float]:
        """Return microseconds of each of ``count`` collectives of ``size`` bytes, or of as many as fit into ``limit_s``.

        All ranks do the same number: the slowest one's estimate decides it, told by a collective.
        """
        communicator = self.ctx.mesh["tp"]
        value = torch.ones(size // 4)
        collective: Any = communicator.all_reduce if operation == "all-reduce" else communicator.all_gather
        began_ns = time.perf_counter_ns()
        for _ in range(_WARM_UP):
            collective(value)
            value.fill_(1.0)
        estimate_s = torch.tensor([(time.perf_counter_ns() - began_ns) / 1e9 / _WARM_UP])
        communicator.all_reduce(estimate_s, "max")
        count = max(1, min(count, int(limit_s / max(float(estimate_s), 1e-9))))
        times_us = []
        value.fill_(1.0)
        communicator.barrier()
        for number in range(count):
            if number % 64 == 63:  # sums double at each turn
                value.fill_(1.0)
            began_ns = time.perf_counter_ns()
            collective(value)
            times_us.append((time.perf_counter_ns() - began_ns) / 1000)
        return times_us
