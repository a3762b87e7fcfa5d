"""Ranks on several hosts, for tests of what happens to them there."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

from support.doomed import WAYS
from support.mortal_driver import beget_daemon

import zspmd


class Member(zspmd.Worker):
    """Answers each step with its rank; says where it is, and ends when it is told to.

    Args:
        has_daemon: leave a process in a session of its own, which minds no signal but SIGKILL.
    """

    def setup(self, *, has_daemon: bool = False) -> None:
        if has_daemon:
            beget_daemon()
        print(f"rank {self.ctx.rank} sets up", flush=True)

    def step(self, inputs: Any) -> Any:
        return self.ctx.rank

    @zspmd.rpc
    def place(self) -> dict[str, Any]:
        """Return where this process is, and what it was given."""
        return {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "cwd": os.getcwd(),
            "environment": dict(os.environ),
            "run_files": sorted(path.name for path in Path(os.environ["ZSPMD_RUN_DIR"]).iterdir()),
        }

    @zspmd.rpc
    def pause(self) -> None:
        """Wait for the end of this process."""
        signal.pause()

    @zspmd.rpc
    def end_after(self, at_s: float, way: str, delays_s: list[float | None]) -> None:
        """End this process so many seconds after ``at_s``, by the rank; None for a rank that waits for its end.

        Times are of the clock that all hosts of a ``Cluster`` share, whatever their monotonic ones say.
        """
        delay_s = delays_s[self.ctx.rank]
        if delay_s is None:
            signal.pause()
            return
        time.sleep(max(0.0, at_s + delay_s - time.time()))  # what it waits for is a moment
        WAYS[way][0]()
