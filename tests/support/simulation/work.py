"""What ranks do in a step: each its part, and some of it together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zspmd.workers.worker import Worker, rpc

if TYPE_CHECKING:
    from .launch import SimulatedLaunch

PEER_LOSS = "Connection closed by peer"
PEER_NOTICES_S = 0.02  # the end of a peer, at most


class SimulatedWorker(Worker):
    """Counts its steps and echoes them; raises ``error`` where it was given one."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.num_steps = 0
        self.error: Exception | None = None

    def step(self, inputs: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.num_steps += 1
        return {"rank": self.rank, "number": inputs["number"], "num_steps": self.num_steps}

    @rpc
    def twice(self, number: int) -> list[int]:
        return [self.rank, 2 * number, self.num_steps]

    @rpc
    def refuse(self, number: int) -> None:
        raise ValueError(f"rank {self.rank} refuses {number}")


class Collectives:
    """Where ranks wait for each other in a step; a rank that ends fails those that wait for it, then and later."""

    def __init__(self, launch: SimulatedLaunch) -> None:
        self._launch = launch
        self._waiting: dict[int, dict[int, Callable[[Exception | None], None]]] = {}
        self._has_lost = False

    def is_waiting(self, rank: int) -> bool:
        return any(rank in there for there in self._waiting.values())

    def enter(self, rank: int, seq: int, leave: Callable[[Exception | None], None]) -> None:
        """Call ``leave`` when all ranks are there, or with the error that a lost peer makes."""
        there = self._waiting.setdefault(seq, {})
        there[rank] = leave
        if self._has_lost:
            self._release(seq, is_lost=True)
        elif len(there) == self._launch.options.num_ranks:
            self._release(seq, is_lost=False)

    def lost(self) -> None:
        """Note that a rank has ended."""
        self._has_lost = True
        for seq in list(self._waiting):
            self._release(seq, is_lost=True)

    def _release(self, seq: int, *, is_lost: bool) -> None:
        world = self._launch.world
        for leave in self._waiting.pop(seq).values():
            error = ConnectionError(PEER_LOSS) if is_lost else None
            world.after(world.chance.uniform(0.0, PEER_NOTICES_S if is_lost else 20e-6), leave, error)
