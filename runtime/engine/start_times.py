"""When what happened while an engine started: the moments, in seconds since its process began.

process begins -> engine starts -> checkpoint read -> agent serves -> each rank: forked from what has imported torch, connected,
                                                      weights read -> ranks ready -> KV pool made -> first token
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from ..driver.events import GroupEvent

_START_TICKS_FIELD = 19  # of /proc/self/stat, behind the name: when the process began, in clock ticks since the boot
_EVENTS = {
    "serving": "agent serves",
    "started": "forked",
    "connected": "connected",
    "ready": "ranks ready",
}


@dataclass(frozen=True)
class Moment:
    """One thing that was done.

    Attributes:
        what: in words; the same for every rank that does it.
        at_s: seconds since this process began, to a hundredth.
        rank: who did it; None for the driver, and for all ranks together.
    """

    what: str
    at_s: float
    rank: int | None = None


class StartTimes:
    """Notes the moments of one start, the first; what ranks do again after a fault is no part of it.

    Attributes:
        is_whole: the first token has come, so that nothing more is noted.
    """

    def __init__(self) -> None:
        self._began_at = process_began_at()
        self._moments: list[Moment] = []
        self.is_whole = False

    def mark(self, what: str) -> None:
        """Note what the driver has just done."""
        self._add(what, time.monotonic(), None)

    def progressed(self, rank: int, done: int, total: int, what: str) -> None:
        """Note that a rank has come to the end of a part of its set-up."""
        if done >= total and not self.is_whole:
            self._add(f"{what} read", time.monotonic(), rank)

    async def add_events(self, events: AsyncIterator[GroupEvent]) -> None:
        """Note what has happened to a group that is ready."""
        async for event in events:
            if event.kind in _EVENTS:
                self._add(_EVENTS[event.kind], event.at, event.rank)
            if event.kind == "ready":
                return

    def first_token(self) -> None:
        """Note that a token has come, which is the end of the start."""
        self.is_whole = True
        self.mark("first token")

    def moments(self) -> tuple[Moment, ...]:
        """Return what was noted, in order."""
        return tuple(sorted(self._moments, key=lambda moment: moment.at_s))

    def _add(self, what: str, at: float, rank: int | None) -> None:
        self._moments.append(Moment(what, at - self._began_at, rank))


def process_began_at() -> float:
    """Return when this process began, in seconds on the monotonic clock, to a hundredth: before its interpreter did anything."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    began_s = int(fields[_START_TICKS_FIELD]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - began_s)


def describe_moments(moments: Iterable[Moment]) -> list[str]:
    """Return a line for each moment: when it was, how long after the one before, and what; ranks that did the same share a line."""
    merged: dict[str, list[Moment]] = {}
    for moment in moments:
        merged.setdefault(moment.what, []).append(moment)
    lines, before_s = [], 0.0
    for what, each in sorted(merged.items(), key=lambda item: item[1][-1].at_s):
        at_s = each[-1].at_s
        ranks = [moment.rank for moment in each if moment.rank is not None]
        who = "" if not ranks else f"rank {ranks[0]}: " if len(ranks) == 1 else f"{len(ranks)} ranks, the last {ranks[-1]}: "
        lines.append(f"{at_s:7.2f} s  {at_s - before_s:+7.2f}  {who}{what}")
        before_s = at_s
    return lines
