"""Records in both directions over a pair of file descriptors, on the running event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from ...errors import BadFrameError
from .agent_protocol import AgentRecord, RecordReader, encode_record

_CHUNK_BYTES = 256 << 10


class RecordStream:
    """One end of the channel between driver and agent: a socket, a pair of pipes, or ssh's standard streams.

    It owns its descriptors. ``on_record`` is called for each record, then ``on_end`` once: with None at the end of the stream,
    with the error when the peer broke the protocol. Both run on the loop and must not raise.
    """

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        on_record: Callable[[AgentRecord], None],
        on_end: Callable[[BadFrameError | None], None],
        reader: RecordReader | None = None,
    ) -> None:
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._on_record = on_record
        self._on_end = on_end
        self._reader = reader or RecordReader()
        self._outgoing = bytearray()
        self._flushed: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = False
        self._has_ended = False

    @property
    def pending_bytes(self) -> int:
        """Bytes that wait for the peer to read."""
        return len(self._outgoing)

    def open(self) -> None:
        """Begin to read, on the running loop."""
        for fd in {self._read_fd, self._write_fd}:
            os.set_blocking(fd, False)
        self._is_open = True
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._read_fd, self._read)

    def send(self, record: AgentRecord) -> None:
        """Queue a record; it is dropped when the peer is gone, which ``on_end`` reports."""
        if not self._is_open or self._has_ended:
            return
        was_empty = not self._outgoing
        self._outgoing += encode_record(record)
        if was_empty:
            self._write()

    async def wait_flushed(self, timeout_s: float) -> bool:
        """Wait until the peer has taken everything; False when it did not within ``timeout_s``."""
        if self._outgoing:
            self._flushed = asyncio.Event()
            try:
                await asyncio.wait_for(self._flushed.wait(), timeout_s)
            except asyncio.TimeoutError:
                return False
        return True

    def drain(self) -> None:
        """Handle everything that has arrived by now."""
        while self._is_open and not self._has_ended and self._read():
            pass

    def close(self) -> None:
        """Close the descriptors; what was not sent is lost. Safe to call again, and after the loop is closed."""
        if not self._is_open:
            return
        self._is_open = False
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._read_fd)
            self._loop.remove_writer(self._write_fd)
        for fd in {self._read_fd, self._write_fd}:
            os.close(fd)

    def _read(self) -> bool:
        """Handle one chunk; False when there was none."""
        try:
            data = os.read(self._read_fd, _CHUNK_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionResetError:  # a socket's peer that closed with unread bytes
            data = b""
        if not data:
            self._end(None)
            return False
        try:
            for record in self._reader.feed(data):
                self._on_record(record)
        except BadFrameError as error:
            self._end(error)
        return True

    def _write(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self._write_fd, self._outgoing[:_CHUNK_BYTES])]
        except (BlockingIOError, InterruptedError):
            asyncio.get_running_loop().add_writer(self._write_fd, self._write)
            return
        except (BrokenPipeError, ConnectionResetError):  # the reader side reports the end, after what the peer sent before it
            self._outgoing.clear()
        asyncio.get_running_loop().remove_writer(self._write_fd)
        if self._flushed is not None:
            self._flushed.set()

    def _end(self, error: BadFrameError | None) -> None:
        if self._has_ended or not self._is_open:
            return
        self._has_ended = True
        asyncio.get_running_loop().remove_reader(self._read_fd)
        self._outgoing.clear()
        self._on_end(error)
