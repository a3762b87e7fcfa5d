"""A driver program of its own, for tests that take something away from it: launches, does a step, and says how that ended.

    python -m support.launch_once '{"worker": "Echo", "files": 30}'

prints a JSON object: ``error`` and ``text`` of what was raised, empty if nothing was; and ``left``, the files in directory ``look``.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
from support.groups import launch

import zspmd
from zspmd.runtime.driver import processes


def main() -> None:
    """Do what the order says.

    It may have: ``worker``, ``world_size`` and ``options`` of the launch; ``files``, the limit of descriptors from then on;
    ``unchecked``, to have it run out of them in the middle; ``exhaust``, to take all descriptors once the ranks are ready;
    ``coordinate``, to have the ranks use the store then; ``kill``, a rank; ``look``, a directory; ``tell``, a file for the answer;
    ``remove_cwd``.
    """
    order: dict[str, Any] = json.loads(sys.argv[1])
    error, text = "", ""
    try:
        asyncio.run(_run(order))
    except zspmd.ZspmdError as raised:
        error, text = type(raised).__name__, str(raised)
    left = sorted(os.listdir(order["look"])) if "look" in order else []
    answer = json.dumps({"error": error, "text": text, "left": left})
    if "tell" in order:
        Path(order["tell"]).write_text(answer)
    else:
        print(answer, flush=True)


async def _run(order: dict[str, Any]) -> None:
    if order.get("remove_cwd"):
        os.rmdir(os.getcwd())
    if order.get("unchecked"):
        processes.check_resources = lambda world_size: None  # type: ignore[attr-defined]  # where it is used
    workers = launch(order.get("worker", "Echo"), order.get("world_size", 2), **order.get("options", {}))
    if "files" in order:
        resource.setrlimit(resource.RLIMIT_NOFILE, (order["files"], order["files"]))
    async with workers:
        if order.get("exhaust"):
            _take_descriptors()
        if order.get("coordinate"):
            await workers.call("meet")
        if "kill" in order:
            pid = workers.health()[order["kill"]].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            assert len(await workers.step({"x": np.ones(4)}, timeout_s=30)) == workers.world_size


def _take_descriptors() -> None:
    try:
        while True:
            os.dup(0)
    except OSError:
        return


if __name__ == "__main__":
    main()
