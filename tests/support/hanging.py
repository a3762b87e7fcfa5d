"""Workers that hang, each in another way, and one that is only slow."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from typing import Any

import numpy as np

import zspmd


def hold_interpreter() -> None:
    """Block for ever in native code that does not give up the interpreter; a read, since a signal's handler does not end it."""
    read_fd, _ = os.pipe()
    ctypes.PyDLL(None).read(read_fd, ctypes.create_string_buffer(1), 1)


def loop_for_ever() -> None:
    while True:
        pass


def stop_itself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def skip_the_collective() -> None:
    threading.Event().wait()


WAYS = {
    "holds the interpreter": hold_interpreter,
    "loops for ever": loop_for_ever,
    "is stopped": stop_itself,
    "skips a collective": skip_the_collective,
}


class Hanging(zspmd.Worker):
    """Sums over the ranks in each step, if it was made with ``collective``; rank 1 hangs first when the step's input names a way."""

    def setup(self, *, collective: bool = False) -> None:
        self.collective = collective
        if collective:
            self.ctx.mesh["world"].barrier()

    def step(self, inputs: Any) -> Any:
        if self.ctx.rank == 1 and inputs in WAYS:
            WAYS[inputs]()
        if self.collective:
            self.ctx.mesh["world"].all_reduce(np.ones(4))
        return inputs


class Slow(zspmd.Worker):
    """Computes for a while in each step, the last rank ten times as long as the others."""

    def step(self, inputs: Any) -> Any:
        busy_s = 0.02 if self.ctx.rank == self.ctx.world_size - 1 else 0.002
        until = time.thread_time() + busy_s  # of processor time, however many share the cores
        while time.thread_time() < until:
            pass
        return inputs * 2
