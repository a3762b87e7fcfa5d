"""Workers that cling to life when their group closes."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from support.mortal_driver import beget_daemon

import zspmd


class Clinging(zspmd.Worker):
    """The last rank does not end when it is asked to; ``how`` says in which way."""

    def setup(self, *, how: str) -> None:
        self.how = how if self.ctx.rank == self.ctx.world_size - 1 else "ends"
        if self.how == "has daemons":
            for _ in range(5):
                beget_daemon()
        if self.how == "has a hydra":
            beget_hydra()

    def step(self, inputs: Any) -> Any:
        if inputs == "stay" and self.how == "stays in its step":
            time.sleep(3600)
        return inputs

    def teardown(self) -> None:
        if self.how == "ignores signals":
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        if self.how in ("stays in its teardown", "ignores signals"):
            time.sleep(3600)
        if self.how == "is stopped":
            os.kill(os.getpid(), signal.SIGSTOP)


def beget_hydra() -> None:
    """Leave a process that every few milliseconds becomes another one, in another session, so that no pid of it can be relied on."""
    if os.fork() == 0:
        while True:
            os.setsid() if os.getsid(0) != os.getpid() else None
            time.sleep(0.003)
            if os.fork() != 0:
                os._exit(0)
