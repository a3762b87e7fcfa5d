"""One end of a byte stream that is carried between a socket here and one elsewhere, both ways, in chunks and with bounded memory."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable

from ....errors import BadFrameError

CHUNK_BYTES = 128 << 10
WINDOW = 8  # chunks each way that are sent and not yet passed on at the other end


class ByteTunnel:
    """Reads a socket into chunks and writes arrived chunks to it, on the running loop. It owns the socket.

        socket --read--> send(chunk)   while fewer than WINDOW of them are not ``granted``
        socket <-write-- ``receive``   grant() once a chunk is written, or dropped since nobody reads any more

    ``on_read_end`` is called once when the socket's other end has closed or finished; ``on_written_out`` once when, after ``finish``,
    everything is written.
    """

    def __init__(
        self,
        end: socket.socket,
        *,
        send: Callable[[bytes], None],
        grant: Callable[[], None],
        on_read_end: Callable[[], None],
        on_written_out: Callable[[], None],
    ) -> None:
        self._socket = end
        self._send = send
        self._grant = grant
        self._on_read_end = on_read_end
        self._on_written_out = on_written_out
        self._pending: deque[memoryview] = deque()
        self._num_in_flight = 0
        self._is_reading = False
        self._has_read_all = False
        self._is_finished = False
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self) -> None:
        """Begin to read."""
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._set_reading()

    def granted(self) -> None:
        """Take note that the other end has passed a chunk on."""
        self._num_in_flight = max(0, self._num_in_flight - 1)
        self._set_reading()

    def receive(self, chunk: bytes) -> None:
        """Pass bytes on that came from the other end.

        Raises:
            BadFrameError: larger than a chunk, or more than the window allows.
        """
        if self._is_closed:
            return
        if len(chunk) > CHUNK_BYTES or len(self._pending) >= WINDOW:
            raise BadFrameError(f"{len(chunk)} B beside {len(self._pending)} chunks; the limits are {CHUNK_BYTES} B and {WINDOW} chunks")
        self._pending.append(memoryview(chunk))
        if len(self._pending) == 1:
            self._write()

    def finish(self) -> None:
        """Let the socket's other end find the end of the stream, behind what is still to be written."""
        if not self._is_finished:
            self._is_finished = True
            self._finish_when_written()

    def close(self) -> None:
        """Close the socket; what is not written is lost. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
        self._pending.clear()
        self._socket.close()

    def _set_reading(self) -> None:
        assert self._loop is not None, "open comes first"
        wants = not self._is_closed and not self._has_read_all and self._num_in_flight < WINDOW
        if wants and not self._is_reading:
            self._loop.add_reader(self._socket, self._read)
        elif self._is_reading and not wants and not self._is_closed:
            self._loop.remove_reader(self._socket)
        self._is_reading = wants

    def _read(self) -> None:
        try:
            data = self._socket.recv(CHUNK_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionResetError:  # closed with unread bytes
            data = b""
        if data:
            self._num_in_flight += 1
            self._send(data)
        else:
            self._has_read_all = True
        self._set_reading()
        if not data:
            self._on_read_end()

    def _write(self) -> None:
        assert self._loop is not None, "open comes first"
        while self._pending:
            chunk = self._pending[0]
            try:
                count = self._socket.send(chunk)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._socket, self._write)
                return
            except (BrokenPipeError, ConnectionResetError):
                count = len(chunk)  # nobody reads it: the end of the stream the other way says so
            if count < len(chunk):
                self._pending[0] = chunk[count:]
            else:
                self._pending.popleft()
                self._grant()
        if not self._is_closed:
            self._loop.remove_writer(self._socket)
            self._finish_when_written()

    def _finish_when_written(self) -> None:
        if self._is_finished and not self._pending and not self._is_closed:
            with contextlib.suppress(OSError):  # the other end has closed it
                self._socket.shutdown(socket.SHUT_WR)
            self._on_written_out()
