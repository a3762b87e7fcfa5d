"""A thread that tells the driver every second that this rank lives, and in which phase it is."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from ..transport.records import Beat

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..transport.control_sockets import ControlClient
    from ..transport.records import Hello
    from ..transport.sockets import StepSubscriber
    from .context import RankStatus

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Heartbeat:
    """Sends a ``Beat`` each ``period_s`` over a connection of its own, which the thread opens by ``connect`` and closes."""

    def __init__(
        self,
        connect: Callable[[], ControlClient],
        hello: Hello,
        status: RankStatus,
        subscriber: StepSubscriber,
        *,
        period_s: float,
    ) -> None:
        self._connect = connect
        self._hello = hello
        self._status = status
        self._subscriber = subscriber  # only its counters: the socket is the main thread's
        self._period_s = period_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zspmd-heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for it; idempotent."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._period_s)

    def _run(self) -> None:
        client = self._connect()
        try:
            client.send(self._hello)
            while True:
                client.send(self._beat())
                if self._stopped.wait(self._period_s):
                    return
        finally:
            client.close()

    def _beat(self) -> Beat:
        status, subscriber = self._status, self._subscriber
        return Beat(
            phase=status.phase,
            seq=status.seq,
            done_seq=status.done_seq,
            step_id=status.step_id,
            done_step_id=status.done_step_id,
            memory_bytes=resident_bytes(),
            foreign_frames=subscriber.dropped_foreign,
            duplicate_frames=subscriber.dropped_duplicates,
            gaps=subscriber.gaps,
        )


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * _PAGE_BYTES
