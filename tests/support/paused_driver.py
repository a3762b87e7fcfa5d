"""A driver to be stopped and continued: prints the phase that it is in, and at the end what it got and what happened meanwhile.

Every deadline of its is shorter than the pause that its tests make, and much longer than anything here takes.

    python -m support.paused_driver DEADLINE_S NUM_STEPS
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import zspmd


class Summing(zspmd.Worker):
    """Adds up what it gets, so that an answer tells of every step before it."""

    def setup(self) -> None:
        self.total = 0
        print("loading", flush=True)
        time.sleep(0.2)  # waits for nothing: the driver is stopped in it

    def step(self, inputs: Any) -> Any:
        self.total += inputs
        time.sleep(0.01)
        return self.total

    def teardown(self) -> None:
        time.sleep(0.2)


async def live(deadline_s: float, num_steps: int) -> None:
    deadlines = zspmd.Deadlines(beat_s=0.1, step_s=deadline_s, drain_s=deadline_s, kill_s=deadline_s)
    options: dict[str, Any] = {"world_size": 2, "output_ranks": "all", "preload": (), "deadlines": deadlines}
    group = zspmd.launch("support.paused_driver:Summing", on_log=lambda *_: print("load", flush=True), **options)
    async with group:
        print("steps", flush=True)
        answers = [await pending for pending in [await group.submit(number) for number in range(num_steps)]]
        print("shutdown", flush=True)
    verdicts = [event.kind for event in [event async for event in group.events()] if event.kind in ("stalled", "failed")]
    print(json.dumps({"answers": answers, "verdicts": verdicts}), flush=True)


if __name__ == "__main__":
    asyncio.run(live(float(sys.argv[1]), int(sys.argv[2])))
