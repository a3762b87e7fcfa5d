"""A driver to be killed: lives through start, load, steps and shutdown, and prints each as it begins.

    python -m support.mortal_driver WORLD_SIZE [stopped] [daemons] [tcp]

``stopped`` has it stop a rank once all are ready; ``daemons`` has each rank leave a process in a session of its own; ``tcp`` has them
connect over TCP.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import Any

import zspmd
from zspmd.errors import ZspmdError

NUM_STEPS = 50
PHASES = ("load", "steps", "shutdown")


class Loader(zspmd.Worker):
    """Takes a while to set up, and may leave a daemon behind it."""

    def setup(self, *, has_daemon: bool) -> None:
        if has_daemon:
            beget_daemon()
        print("loading", flush=True)
        time.sleep(0.15)  # waits for nothing: it is what the driver is killed in

    def step(self, inputs: Any) -> Any:
        time.sleep(0.002)
        return inputs

    def teardown(self) -> None:
        time.sleep(0.05)


def beget_daemon() -> None:
    """Leave a process that is nobody's child, in a session of its own, and minds no signal but SIGKILL."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if os.fork() == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            signal.pause()
        os._exit(0)
    os.waitpid(child, 0)


async def live(world_size: int, options: list[str]) -> None:
    group = zspmd.launch(
        "support.mortal_driver:Loader",
        world_size=world_size,
        worker_args={"has_daemon": "daemons" in options},
        preload=(),
        deadlines=zspmd.Deadlines(beat_s=0.2, drain_s=2.0, kill_s=1.0),
        on_log=lambda *_: print("load", flush=True),
        bind="127.0.0.1" if "tcp" in options else None,
    )
    async with group:
        print("steps", flush=True)
        if "stopped" in options:
            pid = group.health()[-1].pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
        steps = [asyncio.ensure_future(group.step(number, timeout_s=5.0)) for number in range(NUM_STEPS)]
        await asyncio.wait(steps, timeout=0.5)
        for step in steps:
            step.cancel()
        await asyncio.gather(*steps, return_exceptions=True)
        print("shutdown", flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(live(int(sys.argv[1]), sys.argv[2:]))
    except ZspmdError as error:  # of the rank that was stopped
        sys.exit(str(error))
