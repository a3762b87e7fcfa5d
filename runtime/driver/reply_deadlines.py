"""The deadlines of all steps and calls on one timer, which a step that is answered in time never touches."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping

from ...errors import ConfigError
from .alarm import PatientDelay
from .pending import PendingReply

_EARLY_S = 0.001  # by as much uvloop, which counts milliseconds, may ring before it is due


def check_limit(timeout_s: float) -> float:
    """Return ``timeout_s``; raises ConfigError unless it is a number of seconds above 0."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise ConfigError(f"timeout_s is {timeout_s!r}; it must be a number of seconds above 0")
    return timeout_s


class ReplyDeadlines:
    """Calls ``on_overdue`` for each reply that is still in ``pending`` once the loop has run for its limit, a ``PatientDelay``.

    One timer serves all. It rings when the first slice of any reply ends, or sooner, and a reply is seen by it then for the first time:
    where steps follow each other, eight of them in the time of one limit.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, pending: Mapping[int, PendingReply], on_overdue: Callable[[PendingReply], None]
    ) -> None:
        self._loop = loop
        self._pending = pending
        self._on_overdue = on_overdue
        self._timer: asyncio.TimerHandle | None = None
        self._served_s = math.inf  # replies with this limit or a longer one have no slice that ends before the timer rings

    def watch(self, reply: PendingReply) -> None:
        """Note that a reply has come to ``pending``."""
        if reply.limit_s < self._served_s:
            self._set(self._begin(reply), reply.limit_s)

    def close(self) -> None:
        """Never ring again; idempotent."""
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self, reply: PendingReply) -> PatientDelay:
        reply.delay = delay = PatientDelay(reply.limit_s, reply.published_ns / 1e9)
        return delay

    def _set(self, delay: PatientDelay, limit_s: float) -> None:
        self.close()
        self._served_s = limit_s
        self._timer = self._loop.call_at(delay.due, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        self._served_s, self._timer = math.inf, None
        waiting = [(reply.delay or self._begin(reply), reply) for reply in self._pending.values() if reply.limit_s < math.inf]
        overdue = [reply for delay, reply in waiting if delay.due <= now + _EARLY_S and delay.end_slice(now)]
        for reply in overdue:
            reply.limit_s = math.inf
            self._on_overdue(reply)
        left = [(delay, reply.limit_s) for delay, reply in waiting if reply.limit_s < self._served_s]
        if left:
            self._set(*min(left, key=lambda one: one[0].due))
