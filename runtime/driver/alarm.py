"""A timer that a pause of its own process does not ring: SIGSTOP, a suspended machine, a callback that holds the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PAUSE_S = 0.5  # a timer later than that was held up with all the loop
_NUM_SLICES = 8


class PatientDelay:
    """How much of a delay is left, for whoever has the timer: ``end_slice`` is to be called once the loop has come to ``due``.

    What arrived during a pause is read only after the timers that it made late, and a suspended machine has stopped the ranks as well.
    So the delay is spent in slices, and each counts once however late it ends: of a pause no more than a slice is counted, wherever in
    the delay it falls. A last slice that was late is followed by another, so that what waits is read before the delay is over; by so many
    at most as the delay has, for a loop that is always late.
    """

    __slots__ = ("_num_left", "_slice_s", "due")

    def __init__(self, delay_s: float, now: float) -> None:
        self._slice_s = delay_s / _NUM_SLICES
        self._num_left = _NUM_SLICES
        self.due = now + self._slice_s

    def end_slice(self, now: float) -> bool:
        """Begin the next slice; returns whether there is none left, and the delay is over."""
        self._num_left -= 1
        was_late = now - self.due >= min(PAUSE_S, self._slice_s)
        self.due = now + self._slice_s
        return self._num_left <= 0 and not (was_late and self._num_left > -_NUM_SLICES)


class Alarm:
    """Calls ``callback`` once the loop has run for ``delay_s``, a ``PatientDelay``, until ``cancel``."""

    __slots__ = ("_callback", "_delay", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, delay_s: float, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._delay = PatientDelay(delay_s, loop.time())
        self._arm()

    def cancel(self) -> None:
        """Never ring; idempotent."""
        self._timer.cancel()

    def _arm(self) -> None:
        self._timer = self._loop.call_at(self._delay.due, self._end_slice)

    def _end_slice(self) -> None:
        if self._delay.end_slice(self._loop.time()):
            self._callback()
        else:
            self._arm()
