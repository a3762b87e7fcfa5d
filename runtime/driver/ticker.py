"""Telling ranks the number of the last frame, so that one that lost the end of the stream learns of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from ...errors import BackpressureError
from ...transport.window import CreditWindow

FIRST_TICK_S = 0.25
LAST_TICK_S = 60.0  # so that a step of hours leaves a few hundred unread ticks in a rank's pipe, far below the high-water mark


class Ticker:
    """Calls ``tick`` while frames are in flight and nothing moves: after 0.25 s, then at twice the distance each time.

    A lost frame in the middle shows by the next one; only the last needs this. While steps follow each other, all that it costs is
    a timer four times a second.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, window: CreditWindow, tick: Callable[[], None]) -> None:
        self._loop = loop
        self._window = window
        self._tick = tick
        self._timer: asyncio.TimerHandle | None = None
        self._period_s = FIRST_TICK_S
        self._seen_oldest = -1
        self.num_ticks = 0

    def arm(self) -> None:
        """Begin to watch, as closely as the first; call it after each publication: also of a STOP after a long silence."""
        if self._timer is None:
            self._restart()
        elif self._period_s > FIRST_TICK_S:
            self.moved()

    def moved(self) -> None:
        """Note that the window has moved, or a frame was sent again: it is watched as closely as the first."""
        if self._period_s > FIRST_TICK_S and self._timer is not None:
            self._timer.cancel()
            self._restart()

    def close(self) -> None:
        """Stop; idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if not self._window.in_flight:
            return
        if self._window.oldest != self._seen_oldest:
            self._restart()
            return
        with contextlib.suppress(BackpressureError):  # a rank that does not read cannot be told; its step's deadline names it
            self._tick()
            self.num_ticks += 1
        self._period_s = min(2 * self._period_s, LAST_TICK_S)
        self._timer = self._loop.call_later(self._period_s, self._look)

    def _restart(self) -> None:
        self._seen_oldest = self._window.oldest
        self._period_s = FIRST_TICK_S
        self._timer = self._loop.call_later(FIRST_TICK_S, self._look)
