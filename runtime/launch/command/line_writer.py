"""Lines on their way to standard output and error, written by a thread so that whoever reads them slowly stalls nothing else.

``zspmd-run script.py | less`` would otherwise stop at the first full screen with everything that its loop does: the coordinator's
store, signals, the supervision of ranks.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable

MAX_PENDING_BYTES = 64 << 20
_IDLE_S = 0.5


class LineWriter:
    """Writes whole lines to descriptors, in order; ``flush`` tells when all is written.

    Of what exceeds ``MAX_PENDING_BYTES`` lines are dropped, and a line says how many. ``on_closed`` is called once for each
    descriptor that takes no more, with the error, from the writing thread, which ends when there has been nothing to do for a while.
    """

    def __init__(self, on_closed: Callable[[int, OSError], None]) -> None:
        self._on_closed = on_closed
        self._queue: deque[tuple[int, bytes]] = deque()
        self._change = threading.Condition()
        self._pending_bytes = 0
        self._num_dropped: dict[int, int] = {}
        self._closed: set[int] = set()
        self._thread: threading.Thread | None = None

    def write(self, fd: int, data: bytes) -> None:
        """Queue whole lines."""
        with self._change:
            if fd in self._closed:
                return
            if self._pending_bytes > MAX_PENDING_BYTES:
                self._num_dropped[fd] = self._num_dropped.get(fd, 0) + data.count(b"\n")
                return
            self._tell_dropped(fd)
            self._put(fd, data)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="zspmd-lines", daemon=True)
                self._thread.start()

    @property
    def pending_bytes(self) -> int:
        """Bytes that nobody has taken yet."""
        return self._pending_bytes

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is written, or ``timeout_s`` have passed; whether it is."""
        with self._change:
            for fd in list(self._num_dropped):
                self._tell_dropped(fd)
            return self._change.wait_for(lambda: not self._pending_bytes, timeout_s)

    def _tell_dropped(self, fd: int) -> None:
        if dropped := self._num_dropped.pop(fd, 0):
            self._put(fd, b"[zspmd] %d lines are not shown, since they were read too slowly\n" % dropped)

    def _put(self, fd: int, data: bytes) -> None:
        self._queue.append((fd, data))
        self._pending_bytes += len(data)
        self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._change:
                if not self._change.wait_for(lambda: self._queue, _IDLE_S):
                    self._thread = None
                    return
                fd, data = self._queue.popleft()
                is_closed = fd in self._closed
            if not is_closed:
                self._write_all(fd, data)
            with self._change:
                self._pending_bytes -= len(data)
                self._change.notify_all()

    def _write_all(self, fd: int, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                try:
                    rest = rest[os.write(fd, rest) :]
                except BlockingIOError:  # the descriptor is shared with somebody who made it non-blocking
                    select.select([], [fd], [])
        except OSError as error:  # its reader or terminal is gone, its disk is full
            with self._change:
                self._closed.add(fd)
            self._on_closed(fd, error)
