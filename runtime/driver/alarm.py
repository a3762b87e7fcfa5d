"""A timer that a pause of its own process does not ring: SIGSTOP, a suspended machine, a callback that holds the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PAUSE_S = 0.5  # a timer later than that was held up with all the loop
_NUM_SLICES = 8


class Alarm:
    """Calls ``callback`` once the loop has run for ``delay_s``, until ``cancel``.

    What arrived during a pause is read only after the timers that it made late, and a suspended machine has stopped the ranks as well.
    So the delay is spent in slices, and each counts once however late it ends: of a pause no more than a slice is counted, wherever in
    the delay it falls. A last slice that was late is followed by another, so that what waits is read before the alarm rings; by so many
    at most as the delay has, for a loop that is always late.
    """

    __slots__ = ("_callback", "_due", "_loop", "_num_left", "_slice_s", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, delay_s: float, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._slice_s = delay_s / _NUM_SLICES
        self._num_left = _NUM_SLICES
        self._arm()

    def cancel(self) -> None:
        """Never ring; idempotent."""
        self._timer.cancel()

    def _arm(self) -> None:
        self._due = self._loop.time() + self._slice_s
        self._timer = self._loop.call_at(self._due, self._end_slice)

    def _end_slice(self) -> None:
        self._num_left -= 1
        was_late = self._loop.time() - self._due >= min(PAUSE_S, self._slice_s)
        if self._num_left > 0 or (was_late and self._num_left > -_NUM_SLICES):
            self._arm()
        else:
            self._callback()
