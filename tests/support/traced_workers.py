"""Workers whose launches are traced."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import numpy as np

import zspmd


class Summer(zspmd.Worker):
    """Reduces an array over tp within a span of its own, and marks odd steps."""

    def setup(self) -> None:
        self.communicator = self.ctx.mesh["tp"]
        self.values = np.ones(16, np.float32)

    def step(self, inputs: int) -> int:
        with self.ctx.trace.span("forward"), self.ctx.trace.span("layer"):
            self.communicator.all_reduce(self.values)
        if inputs % 2:
            self.ctx.trace.mark("odd")
        return inputs

    @zspmd.rpc
    def is_traced(self) -> bool:
        return self.ctx.trace.is_on

    @zspmd.rpc
    def in_thread(self) -> None:
        def show() -> None:
            with self.ctx.trace.span("beside"):
                pass

        thread = threading.Thread(target=show, name="helping")
        thread.start()
        thread.join()


class Busy(zspmd.Worker):
    """Shows as many spans in a step as it is told."""

    def step(self, inputs: int) -> None:
        for _ in range(inputs):
            with self.ctx.trace.span("unit"):
                pass


class Doomed(zspmd.Worker):
    """Ends in its third step, by what it is told: a signal on rank 1, or an exception there."""

    def setup(self, *, way: str) -> None:
        self.way = way

    def step(self, inputs: Any) -> None:
        with self.ctx.trace.span("fateful"):
            if inputs == 2 and self.ctx.rank == 1:
                if self.way == "raise":
                    raise ValueError("no third step")
                os.kill(os.getpid(), signal.SIGKILL)
