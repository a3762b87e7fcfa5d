"""The wait for the ranks of a group to be ready, which ends with the first thing that says they are, or cannot be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from ...errors import ZspmdError
from .alarm import Alarm


class Readiness:
    """Whether every rank has set up and answered the SYNC; the first word counts.

    Args:
        not_ready: returns the error of ranks that were not ready in time.
        fault: returns what the group has failed with by now, or None.
    """

    def __init__(self, not_ready: Callable[[], ZspmdError], fault: Callable[[], ZspmdError | None]) -> None:
        self._not_ready = not_ready
        self._fault = fault

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind to the loop that everything is called on."""
        self._loop = loop
        self._ready: asyncio.Future[None] = loop.create_future()
        self._ready.add_done_callback(_see)  # what ``wait`` raises may be another error

    def reach(self) -> None:
        """Note that all are ready."""
        if not self._ready.done():
            self._ready.set_result(None)

    def fail(self, error: ZspmdError) -> None:
        """Note that they will not be."""
        if not self._ready.done():
            self._ready.set_exception(error)

    async def wait(self, start: Coroutine[Any, Any, None], limit_s: float) -> None:
        """Run ``start``, which starts the processes, and return when all are ready.

        Both are waited for together: a rank may fail while others are still being started, and is then the cause.

        Raises:
            ZspmdError: the first that ``fail`` was given, or that of ranks that were not ready within ``limit_s``.
            Whatever ``start`` raises.
        """
        alarm = Alarm(self._loop, limit_s, lambda: self.fail(self._not_ready()))
        starting = self._loop.create_task(start)
        try:
            await asyncio.wait([starting, self._ready], return_when=asyncio.FIRST_COMPLETED)
            if self._ready.done():
                self._ready.result()
            await asyncio.wait([starting])  # all may be ready before the agent has told that it started them: cancelled, it would end them
            fault = self._fault()
            if fault is not None:
                raise fault
            await starting
            await self._ready
        finally:
            alarm.cancel()
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)


def _see(ready: asyncio.Future[None]) -> None:
    """Mark an exception as seen, so that asyncio doesn't complain of one that nobody awaits."""
    if not ready.cancelled():
        ready.exception()
