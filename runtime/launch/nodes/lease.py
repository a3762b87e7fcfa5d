"""How long a peer has been silent, counted so that a pause of one's own counts for nothing; and what its clock says."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

BEAT_S = 1.0
_MIN_BEATS = 10  # in a lease, however short
_DRIFT = 1e-4  # by how much two clocks may run apart


class Lease:
    """Calls ``on_expired`` once, when nothing was ``heard`` for ``lease_s``; ``on_beat`` each second before.

    Silence is counted in beats that this process has run, not in seconds: one that was stopped, or whose machine was suspended, could
    hear nobody, and finds what has come meanwhile before its next beat.
    """

    def __init__(self, lease_s: float, on_beat: Callable[[], None], on_expired: Callable[[], None]) -> None:
        self.lease_s = lease_s
        self._beat_s = min(BEAT_S, lease_s / _MIN_BEATS)
        self._on_beat = on_beat
        self._on_expired = on_expired
        self._num_silent = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, on the running loop, with a beat."""
        self._loop = asyncio.get_running_loop()
        self._on_beat()
        self._timer = self._loop.call_later(self._beat_s, self._beat)

    def heard(self) -> None:
        """Note that the peer lives."""
        self._num_silent = 0

    def cancel(self) -> None:
        """Expire no more; idempotent."""
        if self._timer is not None and not self._loop.is_closed():
            self._timer.cancel()

    def _beat(self) -> None:
        self._num_silent += 1
        if self._num_silent * self._beat_s >= self.lease_s - 1e-9:
            self._on_expired()
            return
        self._on_beat()
        self._timer = self._loop.call_later(self._beat_s, self._beat)


class PeerClock:
    """The monotonic clock of another node, from when a question left, what the answer said, and when it came.

    The answer that took the shortest says most: half of its way and back is the error, and what the clocks may have drifted since.
    """

    def __init__(self) -> None:
        self._offset_ns = 0.0
        self._error_ns = math.inf
        self._taken_ns = self._last_ns = 0

    @property
    def error_s(self) -> float:
        """How far ``here`` may be off, to either side, in seconds; infinite before the first answer."""
        return (self._error_ns + _DRIFT * (self._last_ns - self._taken_ns)) / 1e9

    @property
    def offset_ns(self) -> int:
        """What is to be taken from a time of the peer's to have it on this node's clock."""
        return round(self._offset_ns)

    def answered(self, sent_ns: int, peer_ns: int, received_ns: int) -> None:
        """Take one answer; the first and last are times of this node's clock."""
        error_ns = (received_ns - sent_ns) / 2
        self._last_ns = received_ns
        if error_ns / 1e9 <= self.error_s:
            self._error_ns, self._taken_ns = error_ns, received_ns
            self._offset_ns = peer_ns - (sent_ns + received_ns) / 2

    def here(self, peer_ns: int) -> int:
        """Return what this node's clock showed when the peer's showed ``peer_ns``."""
        return peer_ns - self.offset_ns
