"""Workers whose launches are recorded; environment variables make their replays differ."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

import zspmd

DIFFER = "ZSPMD_TEST_DIFFER"


def differs(what: str) -> bool:
    """Whether this process is to behave otherwise than it was recorded, in one way."""
    return os.environ.get(DIFFER) == what


class Mixer(zspmd.Worker):
    """Uses everything that a recording has to hold: arguments, the coordinator, the store, every collective, steps and calls."""

    def setup(self, *, weight: Any) -> None:
        self.weight = weight
        self.hosts = self.ctx.coordinator.all_gather(b"rank %d" % self.ctx.rank)
        self.ticket = self.ctx.store.add(f"tickets of {self.ctx.rank}", 5)

    def step(self, inputs: Any) -> Any:
        world = self.ctx.mesh["world"]
        total = world.all_reduce(inputs["x"] * (self.ctx.rank + 1))
        if differs("collective") and inputs["number"] == 2:
            world.all_reduce(np.zeros(3, np.float32), "max")
        rows = world.all_gather(total[:2] + self.ctx.rank)
        if differs("value") and inputs["number"] == 2 and self.ctx.rank == 1:
            total[3] += 1.5
        return {"number": inputs["number"], "total": total, "rows": rows, "hosts": self.hosts, "ticket": self.ticket}

    @zspmd.rpc
    def exchange(self, scale: float) -> Any:
        """Do the rest of the collectives."""
        import torch

        world = self.ctx.mesh["world"]
        size, rank = world.size, world.rank
        data = torch.arange(float(size * 3)).reshape(size, 3) * scale + rank
        scattered = world.reduce_scatter(data)
        swapped = world.all_to_all(data.bfloat16())
        world.barrier()
        if rank == 0:
            world.send(data, 1)
        elif rank == 1:
            world.receive(data, 0)
        return [scattered, swapped, world.broadcast(data, size - 1), self.weight]

    @zspmd.rpc
    def fail(self, number: int) -> None:
        raise ValueError(f"rank {self.ctx.rank} does not like {number}")


class FailingAtTheEnd(zspmd.Worker):
    """Raises in the teardown of rank 1."""

    def step(self, inputs: Any) -> Any:
        return inputs

    def teardown(self) -> None:
        if self.ctx.rank == 1 and not differs("failure"):
            raise RuntimeError("the end goes wrong")


class Failing(zspmd.Worker):
    """Raises in a step on rank 1 while rank 0 waits in a collective."""

    def step(self, inputs: Any) -> Any:
        if inputs["number"] == 2 and self.ctx.rank == 1 and not differs("failure"):
            raise RuntimeError("the third step goes wrong")
        return self.ctx.mesh["tp"].all_reduce(np.full(2, float(inputs["number"])))
