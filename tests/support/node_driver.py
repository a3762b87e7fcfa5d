"""A driver of ranks on several hosts: takes orders from its standard input, and tells what happens on its standard output.

    python -m support.node_driver OPTIONS

OPTIONS, orders and what it tells are JSON, each in one line. ``NodeLaunch`` is the other end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import zspmd
from zspmd.errors import NodeLostError, PreflightError, WorkerError, WorkerExitedError, ZspmdError


def tell(event: str, **fields: Any) -> None:
    """Tell the test something, with the time on the clock that it reads too."""
    print(json.dumps({"event": event, "at": time.monotonic(), **fields}), flush=True)


def describe(error: BaseException) -> dict[str, Any]:
    """Return what there is to know of an error."""
    found: dict[str, Any] = {"kind": type(error).__name__, "text": str(error)}
    if isinstance(error, NodeLostError):
        found |= {"host": error.host, "ranks": error.ranks}
    if isinstance(error, WorkerError):
        found |= {"rank": error.rank, "host": error.host, "consequences": error.consequences}
    if isinstance(error, WorkerExitedError):
        found["exit_code"] = error.exit_code
    if isinstance(error, PreflightError):
        found["problems"] = [list(problem) for problem in error.problems]
    if error.__cause__ is not None:
        found["cause"] = describe(error.__cause__)
    return found


def settings(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that a group and an engine have in common."""
    return {
        "hosts": options["hosts"],
        "nodes": zspmd.NodesConfig(**options["nodes"]),
        "deadlines": zspmd.Deadlines(**{"beat_s": 0.2, "ready_s": 60.0, "step_s": 30.0, "kill_s": 1.0, **options["deadlines"]}),
        "on_log": lambda rank, stream, line: tell("log", rank=rank, line=line),
    }


async def orders() -> AsyncIterator[list[Any]]:
    """Yield what the test orders, to the end of the standard input."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)


class Driver:
    """Does what it is ordered with one group: each order is a name and its arguments."""

    def __init__(self, group: zspmd.WorkerGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def serve(self) -> None:
        """Follow orders to the end of them, or until something raises."""
        following = asyncio.ensure_future(self._follow())
        try:
            await asyncio.wait([following, self._failed], return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                self._failed.result()
            await following
        finally:
            for task in (following, *self._tasks):
                task.cancel()
            await asyncio.gather(following, *self._tasks, return_exceptions=True)

    async def _follow(self) -> None:
        async for name, *arguments in orders():
            if name == "close":
                return
            task = asyncio.create_task(self._do(name, arguments))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _do(self, name: str, arguments: list[Any]) -> None:
        try:
            await getattr(self, f"_do_{name}")(*arguments)
        except ZspmdError as error:
            tell("raised", order=name, **describe(error))
            if not self._failed.done():
                self._failed.get_loop().call_later(0.1, self._fail, error)  # every await is to tell that it raised

    def _fail(self, error: ZspmdError) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    async def _do_call(self, method: str, *arguments: Any) -> None:
        tell("answered", answer=await self._group.call(method, *arguments))

    async def _do_steps(self) -> None:
        """Run steps without end, a few in flight, and tell of each tenth."""
        for number in range(1 << 30):
            await self._group.step(number)
            if number % 10 == 0:
                tell("step", number=number)
            await asyncio.sleep(0.005)  # a pace that leaves the machine to the others


async def live(options: dict[str, Any]) -> None:
    group = zspmd.launch(
        "support.node_ranks:Member",
        world_size=options["world_size"],
        worker_args=options["worker_args"],
        log_dir=options["log_dir"],
        output_ranks="all",
        preload=(),
        **settings(options),
    )
    with contextlib.suppress(ZspmdError):
        try:
            async with group:
                tell("ready", plan=[vars(node) for node in group.plan.nodes], pids=[rank.pid for rank in group.health()])
                await Driver(group).serve()
        except ZspmdError as error:
            tell("failed", **describe(error))
            raise
    tell("closed")


if __name__ == "__main__":
    asyncio.run(live(json.loads(sys.argv[1])))
