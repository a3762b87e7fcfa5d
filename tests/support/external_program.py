"""A program with a worker group over the processes that torchrun or mpirun has started.

``external_program.py step|wait|fail [VARIABLE...]``. Each process says its pid first; the driver says what its ranks answer, and at
"wait" waits until it is ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import zspmd
from zspmd.runtime.launch.dial.external import read_external


class Told(zspmd.Worker):
    """Says where it is, raises or hangs."""

    def step(self, inputs: Any) -> Any:
        if inputs == "fail" and self.ctx.rank == 1:
            raise ValueError("rank 1 was asked to")
        if inputs == "wait":
            while True:
                os.pread(os.memfd_create("nothing"), 1, 0)
        return {
            "rank": self.ctx.rank,
            "local_rank": self.ctx.facts.local_rank,
            "local_world_size": self.ctx.facts.local_world_size,
            "pid": os.getpid(),
            "environment": {name: os.environ.get(name) for name in inputs},
        }


def say(**what: Any) -> None:
    sys.stdout.write(f"{json.dumps(what)}\n")  # print has two writes, between which another process may have its own
    sys.stdout.flush()


async def main() -> None:
    say(process=read_external(os.environ).rank, pid=os.getpid())
    deadlines = zspmd.Deadlines(beat_s=0.2, ready_s=45.0, kill_s=2.0)
    options: dict[str, Any] = {"output_ranks": "all", "preload": (), "devices": "cpu", "deadlines": deadlines}
    async with zspmd.launch(Told, launcher="external", **options) as group:
        say(launch_id=group.launch_id, ranks=await group.step(sys.argv[2:]))
        if sys.argv[1] != "step":
            await group.step(sys.argv[1])
    say(ended=True)


if __name__ == "__main__":
    asyncio.run(main())
