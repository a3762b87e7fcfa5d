"""A TCP proxy that harms what passes: whole ZMTP frames or bytes, delays, cuts and half-closes, as a test orders.

It stands between a rank and one of the driver's TCP endpoints, knows where ZMTP frames begin, and has a loop and a thread of its own,
so that nothing the driver does slows it down.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

GREETING_BYTES = 64  # of ZMTP 3, before the first frame
_LONG, _COMMAND = 0x02, 0x04
_CHUNK_BYTES = 64 << 10
_ANSWER_S = 10.0

Direction = Literal["up", "down"]  # from the rank to the driver, and back


@dataclass
class Passing:
    """One frame on its way.

    Attributes:
        connection: the number of its connection, from 0 in the order in which they were made.
        index: the number of the frame in its connection and direction, from 0, commands of the handshake included.
        is_message: whether it is a message rather than a command of the handshake, a ping or a pong.
    """

    connection: int
    direction: Direction
    index: int
    is_message: bool
    data: bytes


Harm = Callable[[Passing], "list[bytes]"]  # what is sent in place of a frame: nothing drops it, twice the same doubles it


def pass_on(passing: Passing) -> list[bytes]:
    """Harm nothing."""
    return [passing.data]


@dataclass
class _Link:
    """One direction of a connection."""

    number: int
    direction: Direction
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@dataclass
class TcpProxy:
    """Listens on 127.0.0.1 and forwards to ``target``; enter it, then connect to ``address`` instead.

    Attributes:
        harm: decides what becomes of each frame; it is called on the proxy's thread.
        delay_s: before each frame is sent on.
        num_frames: that have come in, by direction.
    """

    target: tuple[str, int]
    harm: Harm = pass_on
    delay_s: float = 0.0
    num_frames: dict[Direction, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    address: tuple[str, int] = ("", 0)

    def __enter__(self) -> TcpProxy:
        self._loop = asyncio.new_event_loop()
        self._links: list[_Link] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_connections = 0
        self._flows: dict[Direction, asyncio.Event] = {"up": asyncio.Event(), "down": asyncio.Event()}
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy")
        self._thread.start()
        self._run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, *directions: Direction) -> None:
        """Let nothing through, and close nothing: a pulled cable. Both directions if none is named."""
        self._run(self._set_flowing(directions or ("up", "down"), False))

    def heal(self) -> None:
        """Let through again, what has been held up included."""
        self._run(self._set_flowing(("up", "down"), True))

    def half_close(self, direction: Direction) -> None:
        """Tell the receiving end of every connection that no more comes from there."""
        self._run(self._end(direction))

    def reset(self) -> None:
        """Break every connection at once; new ones are taken."""
        self._run(self._reset())

    async def _open(self) -> None:
        await self._set_flowing(("up", "down"), True)
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = self._server.sockets[0].getsockname()[:2]

    async def _close(self) -> None:
        self._server.close()
        await self._reset()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _set_flowing(self, directions: tuple[Direction, ...], is_flowing: bool) -> None:
        for direction in directions:
            (self._flows[direction].set if is_flowing else self._flows[direction].clear)()

    async def _end(self, direction: Direction) -> None:
        for link in self._links:
            if link.direction == direction and link.writer.can_write_eof():
                link.writer.write_eof()

    async def _reset(self) -> None:
        for link in self._links:
            link.writer.transport.abort()
        self._links.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self._num_connections = self._num_connections, self._num_connections + 1
        far_reader, far_writer = await asyncio.open_connection(*self.target)
        pair = (_Link(number, "up", reader, far_writer), _Link(number, "down", far_reader, writer))
        for link in pair:
            self._links.append(link)
            task = self._loop.create_task(self._forward(link))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward(self, link: _Link) -> None:
        index = 0
        try:
            await self._forward_greeting(link)
            async for data, is_message in _frames(link.reader):
                self.num_frames[link.direction] += 1
                for piece in self.harm(Passing(link.number, link.direction, index, is_message, data)):
                    await asyncio.sleep(self.delay_s)
                    await self._flows[link.direction].wait()
                    link.writer.write(piece)
                    await link.writer.drain()
                index += 1
            link.writer.close()
        except (ConnectionError, asyncio.IncompleteReadError):
            link.writer.transport.abort()

    async def _forward_greeting(self, link: _Link) -> None:
        """Pass it on as it comes: each side sends the rest of its own once it has seen the beginning of the other's."""
        left = GREETING_BYTES
        while left:
            data = await link.reader.read(left)
            if not data:
                raise ConnectionResetError("closed in the greeting")
            link.writer.write(data)
            left -= len(data)

    def _run(self, coroutine: object) -> None:
        future: Future[None] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)  # type: ignore[arg-type]
        future.result(_ANSWER_S)


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[bytes, bool]]:
    """Yield each frame with its head, and whether it is a message; ends where the peer closes between two frames."""
    while flags := await reader.read(1):
        size_bytes = await reader.readexactly(8 if flags[0] & _LONG else 1)
        body = await reader.readexactly(int.from_bytes(size_bytes, "big"))
        yield flags + size_bytes + body, not flags[0] & _COMMAND


def messages(harm: Harm) -> Harm:
    """Apply ``harm`` to messages only, numbered from 0 in each connection and direction."""
    counts: dict[tuple[int, Direction], int] = {}

    def apply(passing: Passing) -> list[bytes]:
        if not passing.is_message:
            return [passing.data]
        key = (passing.connection, passing.direction)
        passing.index = counts.get(key, 0)
        counts[key] = passing.index + 1
        return harm(passing)

    return apply


def swapped(direction: Direction, index: int) -> Harm:
    """Send message ``index`` after the one that follows it."""
    held: list[bytes] = []

    def harm(passing: Passing) -> list[bytes]:
        if passing.direction == direction and passing.index == index:
            held.append(passing.data)
            return []
        return [passing.data, *_taken(held)] if passing.direction == direction else [passing.data]

    return messages(harm)


def _taken(held: list[bytes]) -> Iterator[bytes]:
    while held:
        yield held.pop()
