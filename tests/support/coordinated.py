"""A worker that uses its coordinator as a program of its own would."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import zspmd

CHILD = """
import zspmd
try:
    zspmd.Coordinator.from_env()
except zspmd.ConfigError as error:
    print(f"ConfigError: {error}")
"""


class Coordinated(zspmd.Worker):
    """Exchanges bytes over ``ctx.coordinator`` and over others of its own making."""

    @zspmd.rpc
    def facts(self) -> list[Any]:
        coordinator = self.ctx.coordinator
        facts = coordinator.facts
        is_same = self.ctx.coordinator is coordinator and facts == self.ctx.facts
        return [facts.launch_id, facts.rank, facts.world_size, facts.local_rank, facts.local_world_size, facts.device, is_same]

    @zspmd.rpc
    def exchange(self, data: bytes, src: int) -> list[Any]:
        return exchange(self.ctx.coordinator, data, src)

    @zspmd.rpc
    def exchange_by_another(self, data: bytes, src: int) -> list[Any]:
        with zspmd.Coordinator.from_env(timeout_s=60.0) as coordinator:
            assert coordinator.facts == self.ctx.facts
            return exchange(coordinator, data, src)

    @zspmd.rpc
    def in_a_child(self) -> str:
        """Return what a program that this rank starts is told."""
        return subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, timeout=60).stdout

    @zspmd.rpc
    def absent(self, timeout_s: float) -> list[int]:
        try:
            self.ctx.coordinator.barrier(timeout_s=timeout_s)
        except zspmd.CoordinatorTimeoutError as error:
            return list(error.absent)
        return []


def exchange(coordinator: zspmd.Coordinator, data: bytes, src: int) -> list[Any]:
    received = coordinator.broadcast(data if coordinator.rank == src else None, src)
    coordinator.barrier()
    return [received, coordinator.all_gather(b"%d" % coordinator.rank)]
