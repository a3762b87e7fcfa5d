"""Waiting for room in the credit window, first come first served."""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

from ...errors import BackpressureError, ZspmdError
from ...transport.window import CreditWindow
from .alarm import Alarm


class WindowGate:
    """Lets publishers through as acknowledgements make room; what it has granted counts as taken until it is used."""

    def __init__(self, window: CreditWindow) -> None:
        self._window = window
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._num_granted = 0

    @property
    def has_waiters(self) -> bool:
        return bool(self._waiters)

    @property
    def is_open(self) -> bool:
        """Whether ``wait`` would return at once."""
        window = self._window
        return not self._waiters and window.in_flight + self._num_granted < window.size

    async def wait(self, timeout_s: float) -> None:
        """Return when the caller may publish one frame, which it must do without awaiting anything in between.

        Raises:
            BackpressureError: no room within ``timeout_s``.
            Whatever ``fail`` was given.

        Cancellation: room that had been granted goes to the next in line.
        """
        if self.is_open:
            return
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[None] = loop.create_future()
        self._waiters.append(waiter)
        alarm = Alarm(loop, timeout_s, partial(self._expire, waiter, timeout_s))
        try:
            await waiter
            self._num_granted -= 1
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self._num_granted -= 1
                self.grant()
            raise
        finally:
            alarm.cancel()
            if waiter in self._waiters:  # it gave up before its turn
                self._waiters.remove(waiter)

    def grant(self) -> None:
        """Let through as many as there is room for; call it when the window has moved."""
        while self._waiters and self._has_room():
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._num_granted += 1
                waiter.set_result(None)

    def fail(self, error: ZspmdError) -> None:
        """Have everybody who waits raise ``error``."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(error)

    def _has_room(self) -> bool:
        return self._window.in_flight + self._num_granted < self._window.size

    def _expire(self, waiter: asyncio.Future[None], timeout_s: float) -> None:
        if not waiter.done():
            behind = self._window.behind()
            who = f"rank {behind[0]} has" if len(behind) == 1 else f"ranks {', '.join(map(str, behind))} have"
            waiter.set_exception(
                BackpressureError(
                    f"no room in the window of {self._window.size} frames within {timeout_s:g} s: {who} not done the oldest; "
                    "nothing was sent; WorkerGroup.dump_stacks tells where they are"
                )
            )
