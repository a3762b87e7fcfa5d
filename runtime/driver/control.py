"""The driver's end of the control socket: who is connected, what each rank last said, and the store."""

from __future__ import annotations

import asyncio
import functools
import hmac
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ... import __version__
from ...errors import BackpressureError, BadFrameError, PeerLostError, ProtocolError
from ...transport.control_sockets import ControlServer
from ...transport.frames import Buffer
from ...transport.reader import SocketReader
from ...transport.records import Accepted, Beat, ControlRecord, Hello, Progress, Reject, StoreReply, StoreRequest, TraceEvents
from .store import Replies, StoreState

PURPOSES = ("rank", "beat", "store", "trace")


@dataclass
class RankRecord:
    """What the driver knows of one rank. ``beat_at`` and ``progress`` are None until the rank has sent the first."""

    rank: int
    pid: int | None = None
    host: str = "localhost"
    connection: bytes | None = None
    beat: Beat | None = None
    beat_at: float | None = None
    progress: Progress | None = None


class ControlHub:
    """Serves the control socket: admits connections by the launch's token, keeps beats and progress, runs the store.

    ``on_hello`` is called once a rank has introduced itself, ``on_progress`` at each report, ``on_trace`` with a rank's number and what
    it has done where the launch is traced, ``on_error`` for a connection that
    breaks the protocol, whose message is dropped, or reads nothing, and is then forgotten.
    """

    def __init__(
        self,
        server: ControlServer,
        *,
        token: bytes,
        world_size: int,
        on_hello: Callable[[RankRecord], None],
        on_progress: Callable[[RankRecord], None],
        on_error: Callable[[Exception], None],
        on_trace: Callable[[int, TraceEvents], None] | None = None,
    ) -> None:
        self.ranks = [RankRecord(rank) for rank in range(world_size)]
        self.store = StoreState()
        self._server = server
        self._token = token
        self._on_hello = on_hello
        self._on_progress = on_progress
        self._on_error = on_error
        self._on_trace = on_trace
        self.loop = asyncio.get_running_loop()
        self._admitted: dict[bytes, RankRecord] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._readers = [
            SocketReader(self.loop, socket, functools.partial(self._read_one, index), on_error)
            for index, socket in enumerate(server.sockets)
        ]

    def send(self, connection: bytes, record: ControlRecord, body: bytes = b"", buffers: Sequence[Buffer] = ()) -> None:
        """Send to one connection. One that is gone, or leaves all unread, is forgotten, so that the others get what is theirs."""
        try:
            self._server.send(connection, record, body, buffers)
        except PeerLostError:  # its process has ended, and the agent tells how
            self._admitted.pop(connection, None)
        except BackpressureError as error:
            if self._admitted.pop(connection, None) is not None:
                self._on_error(error)
        for reader in self._readers:
            reader.poke()

    def close(self) -> None:
        """Stop serving; idempotent."""
        for reader in self._readers:
            reader.close()
        if self._timer is not None:
            self._timer.cancel()
        self._server.close()

    def _read_one(self, index: int) -> None:
        connection, record, sender = self._server.receive(index)
        if isinstance(record, Hello):
            if self._is_own(sender, record.rank, record):
                self._admit(connection, record)
            return
        rank = self._admitted.get(connection)
        if rank is None:
            raise ProtocolError(f"a {type(record).__name__} on a control connection that has not said hello")
        if not self._is_own(sender, rank.rank, record):
            return
        if isinstance(record, Beat):
            rank.beat, rank.beat_at = record, time.monotonic()
        elif isinstance(record, Progress):
            rank.progress = record
            self._on_progress(rank)
        elif isinstance(record, TraceEvents) and self._on_trace is not None:
            self._on_trace(rank.rank, record)
            if record.is_closed:
                self.send(connection, Accepted())
        elif isinstance(record, StoreRequest):
            self._reply(self._handle(connection, record))
            self._arm()
        else:
            raise ProtocolError(f"rank {rank.rank} sent a {type(record).__name__}, which only the driver sends")

    def _is_own(self, sender: int | None, claimed: int, record: ControlRecord) -> bool:
        """Say whether a record is of the rank that it speaks for, as far as its connection proves anything."""
        door = self._server.door
        return door is None or sender is None or door.is_own(sender, claimed, f"a {type(record).__name__}")

    def _admit(self, connection: bytes, hello: Hello) -> None:
        if reason := self._refusal(hello):
            self.send(connection, Reject(reason=reason))
            raise ProtocolError(f"refused a control connection: {reason}")
        rank = self.ranks[hello.rank]
        self._admitted[connection] = rank
        if hello.purpose == "rank":
            rank.connection, rank.pid, rank.host = connection, hello.pid, hello.host
            self._on_hello(rank)
        elif hello.purpose == "store":
            self.send(connection, Accepted())

    def _refusal(self, hello: Hello) -> str:
        if not hmac.compare_digest(hello.token, self._token):
            return "the token is not this launch's"
        if hello.version != __version__:
            return f"the rank runs zspmd {hello.version}, the driver {__version__}; install the same version"
        if hello.rank >= len(self.ranks):
            return f"rank {hello.rank} is outside the world of {len(self.ranks)}"
        if hello.purpose not in PURPOSES:
            return f"purpose {hello.purpose!r} is none of {', '.join(PURPOSES)}"
        if hello.purpose == "rank" and self.ranks[hello.rank].connection is not None:
            return f"rank {hello.rank} is connected already, as pid {self.ranks[hello.rank].pid}"
        return ""

    def _handle(self, connection: bytes, request: StoreRequest) -> Replies:
        try:
            return self.store.handle(connection, request, self.loop.time())
        except BadFrameError as error:  # whoever asked is told, rather than left to wait for its timeout
            return [(connection, StoreReply(request_id=request.request_id, error=str(error)[:4096]))]

    def _reply(self, replies: Replies) -> None:
        for connection, reply in replies:
            try:
                self.send(connection, reply)
            except BadFrameError as error:  # it names the absent ones of more keys than a reply may hold
                self.send(connection, StoreReply(request_id=reply.request_id, error=str(error)))

    def _arm(self) -> None:
        """Set the timer for the earliest store timeout."""
        if self._timer is not None:
            self._timer.cancel()
        deadline = self.store.next_deadline()
        self._timer = None if deadline is None else self.loop.call_at(deadline, self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._reply(self.store.expire(self.loop.time()))
        self._arm()
