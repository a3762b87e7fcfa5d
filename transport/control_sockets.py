"""The ends of the control socket: records, and values behind some, between the driver and each connection of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import zmq

from ..errors import BackpressureError, BadFrameError, PeerLostError
from .bound_sockets import bind_sockets, close_sockets
from .chunks import join_parts
from .door import Door
from .frames import Buffer, frame_view
from .messages import (
    HIGH_WATER_MARK,
    SEND_TIMEOUT_MS,
    connect_socket,
    open_socket,
    receive_chunked,
    receive_message,
    receive_parts,
    send_chunked,
    send_message,
)
from .records import ControlRecord, unpack_record
from .schema import pack_record
from .security import RankKeys, needs_keys


class Received(NamedTuple):
    """A record, the connection it came by, and over TCP the rank whose connection that is."""

    connection: bytes
    record: ControlRecord
    sender: int | None


class ControlServer:
    """The driver's end of the control socket: records to and from each connection.

    A connection is known by the index of its socket, one byte, and the name that it has there: so no peer can choose that of a peer of
    the other socket.

    Attributes:
        endpoints: those that are bound, in the order of the argument; ``sockets`` likewise.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoints: Sequence[str], door: Door | None = None) -> None:
        self.door = door
        self._bound = bind_sockets(context, zmq.ROUTER, endpoints, "control", door, zmq.ROUTER_MANDATORY)
        self.endpoints = [bound.endpoint for bound in self._bound]
        self.sockets = [bound.socket for bound in self._bound]

    def receive(self, index: int = 0) -> Received:
        """Return the next record on a socket.

        Raises:
            zmq.Again: nothing has arrived.
            BadFrameError: as ``unpack_record``; the message is gone.
        """
        bound = self._bound[index]
        if bound.door is None:
            whole = bound.socket.recv_multipart(zmq.NOBLOCK)
            return Received(_connection(index, whole[0]), unpack_record(whole[-1]), None)
        name, *parts = receive_parts(bound.socket, zmq.NOBLOCK)
        sender = bound.door.sender(name, "control")
        try:
            frames = join_parts(parts)
            return Received(_connection(index, name.bytes), unpack_record(frame_view(frames[-1]) if frames else b""), sender)
        except BadFrameError as error:
            raise BadFrameError(f"on a control connection of rank {sender}: {error}") from error

    def send(self, connection: bytes, record: ControlRecord, body: bytes = b"", buffers: Sequence[Buffer] = ()) -> None:
        """Send a record, with a codec value behind it where the record says so.

        Raises:
            PeerLostError: the connection is gone.
            BackpressureError: it does not read.
            BadFrameError: the record is beyond its bounds; nothing was sent.
        """
        packed = pack_record(record)  # first: once the connection is named, what comes next goes there, whatever it is
        bound = self._bound[connection[0]]
        try:
            bound.socket.send(connection[1:], zmq.NOBLOCK | zmq.SNDMORE)
            bound.send(bound.socket, packed, [body, *buffers] if body else [], zmq.NOBLOCK)
        except zmq.Again:
            raise BackpressureError(f"control connection {connection.hex()} has left {HIGH_WATER_MARK} records unread") from None
        except zmq.ZMQError as error:
            raise PeerLostError(f"control connection {connection.hex()}: {error}") from error

    def close(self) -> None:
        close_sockets(self._bound)


def _connection(index: int, name: bytes) -> bytes:
    return bytes((index,)) + name


class ControlClient:
    """A rank's end of the control socket. One client for each thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, keys: RankKeys | None = None) -> None:
        self._is_chunked = needs_keys(endpoint)
        self.socket = open_socket(context, zmq.DEALER)
        connect_socket(self.socket, endpoint, "control", keys)

    def send(self, record: ControlRecord) -> None:
        """Send a record; raises PeerLostError when the driver has stopped reading for a minute."""
        try:
            (send_chunked if self._is_chunked else send_message)(self.socket, pack_record(record), ())
        except zmq.Again:
            raise PeerLostError(f"the driver has read no control record for {SEND_TIMEOUT_MS // 1000} s") from None

    def receive(self, timeout_s: float) -> tuple[ControlRecord, list[zmq.Frame | bytes]]:
        """Wait for a record; returns it and the frames behind it.

        Raises:
            PeerLostError: none within ``timeout_s``.
        """
        if not self.socket.poll(max(0, int(timeout_s * 1000)), zmq.POLLIN):
            raise PeerLostError(f"no answer of the driver on the control socket within {timeout_s:g} s")
        first, *rest = (receive_chunked if self._is_chunked else receive_message)(self.socket)
        return unpack_record(frame_view(first)), rest

    def close(self) -> None:
        self.socket.close(0)
