"""The ends of the control socket: records, and values behind some, between the driver and each connection of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import zmq

from ..errors import BackpressureError, BadFrameError, PeerLostError
from .chunks import join_parts
from .door import Door
from .frames import Buffer, frame_view
from .messages import (
    HIGH_WATER_MARK,
    SEND_TIMEOUT_MS,
    bind_socket,
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
    """The driver's end of the control socket: records to and from each connection."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, door: Door | None = None) -> None:
        self.door = door if needs_keys(endpoint) else None
        self._send_message = send_message if self.door is None else send_chunked
        self.socket = open_socket(context, zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.endpoint = bind_socket(self.socket, endpoint, "control", door)

    def receive(self) -> Received:
        """Return the next record.

        Raises:
            zmq.Again: nothing has arrived.
            BadFrameError: as ``unpack_record``; the message is gone.
        """
        if self.door is None:
            whole = self.socket.recv_multipart(zmq.NOBLOCK)
            return Received(whole[0], unpack_record(whole[-1]), None)
        connection, *parts = receive_parts(self.socket, zmq.NOBLOCK)
        sender = self.door.sender(connection, "control")
        try:
            frames = join_parts(parts)
            return Received(connection.bytes, unpack_record(frame_view(frames[-1]) if frames else b""), sender)
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
        try:
            self.socket.send(connection, zmq.NOBLOCK | zmq.SNDMORE)
            self._send_message(self.socket, packed, [body, *buffers] if body else [], zmq.NOBLOCK)
        except zmq.Again:
            raise BackpressureError(f"control connection {connection.hex()} has left {HIGH_WATER_MARK} records unread") from None
        except zmq.ZMQError as error:
            raise PeerLostError(f"control connection {connection.hex()}: {error}") from error

    def close(self) -> None:
        self.socket.close(0)


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
