"""Looking at every rank once a beat, for what no socket and no process tells: silence, and an answer that was lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from ...transport.window import CreditWindow
from .alarm import PAUSE_S
from .control import RankRecord

SILENT_BEATS = 3  # that did not come, until a rank is called silent
LOST_S = 5.0  # from the first beat that tells of an answer until it is given up: the two travel on different sockets


class RankWatch:
    """Compares what ranks say in their beats with what has come of them, each ``beat_s``.

    Silence has no consequence: a rank that holds the interpreter's lock for a minute, or that somebody debugs, is alive, and its step has
    a deadline. A pause of the driver itself counts for nothing.

    Args:
        records: by rank, kept up to date by the control hub.
        window: what has been acknowledged.
        on_silent: gets a rank and the seconds since its last beat, once for each silence.
        on_heard: gets a rank that was silent.
        on_lost: gets a rank and the frame that it has answered while the answer never came.
    """

    def __init__(
        self,
        records: Callable[[], Sequence[RankRecord]],
        window: CreditWindow,
        *,
        beat_s: float,
        on_silent: Callable[[int, float], None],
        on_heard: Callable[[int], None],
        on_lost: Callable[[int, int], None],
    ) -> None:
        self._records = records
        self._window = window
        self._beat_s = beat_s
        self._on_silent = on_silent
        self._on_heard = on_heard
        self._on_lost = on_lost
        self._silent: set[int] = set()
        self._overdue: dict[int, tuple[int, float]] = {}  # by rank: the frame that it says it has answered, and since when
        self._listening_from = 0.0  # the start, or the end of the driver's last pause: nobody could be heard before
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to look."""
        self._loop = loop
        self._listening_from = time.monotonic()
        self._arm()

    def close(self) -> None:
        """Look no more; idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        self._due = time.monotonic() + self._beat_s
        self._timer = self._loop.call_later(self._beat_s, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._due > PAUSE_S:
            self._listening_from = now
            self._overdue.clear()
        for record in self._records():
            if record.beat is not None and record.beat_at is not None:
                self._check_silence(record.rank, now - max(record.beat_at, self._listening_from))
                self._check_answer(record.rank, record.beat.done_seq, now)
        self._arm()

    def _check_silence(self, rank: int, unheard_s: float) -> None:
        if unheard_s <= SILENT_BEATS * self._beat_s:
            if rank in self._silent:
                self._silent.remove(rank)
                self._on_heard(rank)
        elif rank not in self._silent:
            self._silent.add(rank)
            self._on_silent(rank, unheard_s)

    def _check_answer(self, rank: int, answered_seq: int, now: float) -> None:
        due = self._window.due(rank)
        if answered_seq < due:
            self._overdue.pop(rank, None)
            return
        seq, since = self._overdue.get(rank, (-1, now))
        if seq != due:
            self._overdue[rank] = (due, now)
        elif now - since >= LOST_S:
            self._on_lost(rank, due)
