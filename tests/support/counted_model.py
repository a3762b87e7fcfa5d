"""The engine's model worker, taking note of what each step asks of the other ranks, and of what it asks of the driver.

Collectives are counted where the model calls them, so that one that returns at once counts as well; control records where they are sent,
whoever sends them: the store, the coordinator and the making of a communicator all go that way.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import zspmd
from zspmd.transport.control_sockets import ControlClient
from zspmd.workers.communicators.communicator import Communicator
from zspmd.workers.model_worker import ModelWorker

WORKER = "support.counted_model:CountedModel"
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send", "send_nowait", "receive", "barrier")


class CountedModel(ModelWorker):
    """Computes as its base does."""

    def setup(self, **worker_args: Any) -> None:
        self._steps: list[list[list[Any]]] = []  # of each step [axis, kind, elements], one for each collective
        self._extra: Communicator | None = None
        self._sent: Counter[str] = Counter()
        self.ctx.mesh.on_created = self._count
        count_control_records(self._sent)
        super().setup(**worker_args)

    def step(self, inputs: Any) -> list[object]:
        self._steps.append([])
        if self._extra is not None:
            self._extra.barrier()
        return super().step(inputs)

    @zspmd.rpc
    def start_counting(self) -> None:
        """Forget what the start has asked of others."""
        self._sent.clear()

    @zspmd.rpc
    def counted(self) -> list[Any]:
        """Return [the collectives of each step since the last call, what was sent on the control socket since ``start_counting``]."""
        steps, self._steps = self._steps, []
        return [steps, dict(self._sent)]

    @zspmd.rpc
    def add_collective(self) -> None:
        """Meet all ranks once in each step from now on, which no step asks for; making the communicator takes the driver's store."""
        self._extra = self.ctx.mesh["world"]

    def _count(self, axis: str, communicator: Communicator) -> None:
        if communicator.size > 1:  # else no call communicates
            for kind in KINDS:
                setattr(communicator, kind, self._counting(axis, kind, getattr(communicator, kind)))

    def _counting(self, axis: str, kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **options: Any) -> Any:
            if self._steps:  # else it is part of the start, or of a call
                self._steps[-1].append([axis, kind, 0 if kind == "barrier" else args[0].numel()])
            return method(*args, **options)

        return call


def count_control_records(sent: Counter[str]) -> None:
    """Count in ``sent`` every record that this process sends to the driver on a control connection, by its type; for good."""
    send = ControlClient.send

    @functools.wraps(send)
    def counting(client: ControlClient, record: Any, *args: Any, **options: Any) -> None:
        sent[type(record).__name__] += 1
        send(client, record, *args, **options)

    setattr(ControlClient, "send", counting)  # noqa: B010  # an assignment to a method is none to a type checker
