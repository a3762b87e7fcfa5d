"""Reading a ZeroMQ socket from an event loop, without ``zmq.asyncio``.

A ZeroMQ fd is edge-triggered: it becomes readable once for any number of messages, and ``send``, ``recv`` and reading EVENTS all eat
the edge. So each wake-up drains, a spent budget reschedules itself, and whoever sends on the same socket calls ``poke`` afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import zmq

_POLLIN = int(zmq.POLLIN)  # 0.05 us a mask where the enum's member takes 1.05
_EVENTS = int(zmq.EVENTS)
BUDGET = 64  # messages a wake-up, so that a busy socket does not starve the loop


class SocketReader:
    """Calls ``read_one`` for each message that arrives; it must take one message without waiting, or raise ``zmq.Again``.

    Where ``read_one`` returns True it has woken a task, and that runs before the socket is looked at again: what it publishes is on its
    way meanwhile. ``on_error`` gets what ``read_one`` raises otherwise; reading goes on.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: zmq.Socket[Any],
        read_one: Callable[[], bool | None],
        on_error: Callable[[Exception], None],
    ) -> None:
        self._loop = loop
        self._socket = socket
        self._fd = int(socket.getsockopt(zmq.FD))
        self._read_one = read_one
        self._on_error = on_error
        self._is_scheduled = False
        self._is_closed = False
        loop.add_reader(self._fd, self._wake)
        self.poke()

    def poke(self) -> None:
        """Look for messages whose edge was eaten; call it after any send on the same socket."""
        if not self._is_scheduled and not self._is_closed and self._has_arrived():
            self._schedule()

    def drain(self) -> None:
        """Read whatever has arrived by now, budget or not."""
        while not self._read():
            pass

    def close(self) -> None:
        """Stop reading; idempotent. The socket stays open."""
        if not self._is_closed:
            self._is_closed = True
            self._loop.remove_reader(self._fd)

    def _schedule(self) -> None:
        self._is_scheduled = True
        self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Go on behind what was called meanwhile; an edge may have come too, and been read."""
        self._is_scheduled = False
        if not self._is_closed and self._has_arrived():
            self._wake()

    def _wake(self) -> None:
        if not self._read() and not self._is_scheduled:
            self._schedule()

    def _read(self) -> bool:
        """Read up to ``BUDGET`` messages, or to the first that wakes a task; returns whether there is nothing left to do."""
        for _ in range(BUDGET):
            if self._is_closed or self._socket.closed:
                return True
            try:
                if self._read_one():
                    return self._is_closed
            except zmq.Again:
                return True  # the next arrival makes an edge; asking for EVENTS before each message instead takes 1.2 us more
            except Exception as error:  # one bad message must not cost the edge of those behind it
                self._on_error(error)
        return self._is_closed

    def _has_arrived(self) -> bool:
        return not self._socket.closed and bool(int(self._socket.getsockopt(_EVENTS)) & _POLLIN)
