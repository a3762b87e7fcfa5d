"""What happens to a worker group, as a stream for whoever watches: an autoscaler, a dashboard, a test.

One log holds the last events, and each stream is a place in it. So a stream that is opened late begins with what was, a stream that
nobody reads costs nothing, and memory is bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

MAX_EVENTS = 1000


@dataclass(frozen=True)
class GroupEvent:
    """One thing that happened.

    Attributes:
        kind: ``serving`` (this node's agent), ``started`` and ``connected`` (a rank's process, its hello), ``ready``, ``replayed`` (a
            rank missed frames and got them again), ``silent`` and ``heard`` (a rank's beats stop, which alone has no consequence, and
            come again), ``stalled`` (a step or call is overdue), ``refused`` and ``impostor`` (over TCP: a connection; a message in
            another rank's name), ``exited`` (a rank's process), ``failed`` (the group's first cause), ``closing``, ``closed`` (always
            the last), or ``skipped`` (this stream was read too slowly).
        rank: whose it is; None for the whole group.
        detail: in words, with the numbers.
        at: seconds on the monotonic clock.
    """

    kind: str
    rank: int | None = None
    detail: str = ""
    at: float = field(default_factory=time.monotonic)


class EventLog:
    """The last ``MAX_EVENTS`` events of a group, and those who wait for the next."""

    def __init__(self) -> None:
        self._events: deque[GroupEvent] = deque(maxlen=MAX_EVENTS)
        self._num_emitted = 0
        self._waiters: set[asyncio.Future[None]] = set()
        self.is_closed = False

    @property
    def num_waiters(self) -> int:
        """Streams that have yielded everything and wait."""
        return len(self._waiters)

    def kept(self) -> list[GroupEvent]:
        """Return the events that are kept."""
        return list(self._events)

    def emit(self, kind: str, rank: int | None = None, detail: str = "") -> None:
        """Add an event and wake whoever waits; ``closed`` ends every stream."""
        self._events.append(GroupEvent(kind, rank, detail))
        self._num_emitted += 1
        self.is_closed = kind == "closed"
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def stream(self) -> AsyncIterator[GroupEvent]:
        """Yield every event from the first on, and those to come, until the group is closed.

        A reader that is more than ``MAX_EVENTS`` behind gets one ``skipped`` event that says how many it has missed.
        """
        place = 0
        while True:
            first = self._num_emitted - len(self._events)
            if place < first:
                yield GroupEvent("skipped", detail=f"{first - place} events are not kept any more; the last {MAX_EVENTS} are")
                place = max(place, first)
            elif place < self._num_emitted:
                event = self._events[place - first]
                place += 1
                yield event
            elif self.is_closed:
                return
            else:
                await self._wait_for_next()

    async def _wait_for_next(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)  # a reader that gave up
