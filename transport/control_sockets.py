"""The ends of the control socket: records, and values behind some, between the driver and each connection of a rank."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from ..errors import BackpressureError, PeerLostError
from .frames import Buffer
from .records import ControlRecord, unpack_record
from .schema import pack_record
from .sockets import HIGH_WATER_MARK, SEND_TIMEOUT_MS, bind_socket, open_socket, receive_message, send_message


class ControlServer:
    """The driver's end of the control socket: records to and from each connection."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.socket = open_socket(context, zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        bind_socket(self.socket, endpoint)

    def receive(self) -> tuple[bytes, ControlRecord]:
        """Return the next (connection, record).

        Raises:
            zmq.Again: nothing has arrived.
            BadFrameError: as ``unpack_record``; the message is gone.
        """
        frames = self.socket.recv_multipart(zmq.NOBLOCK)
        return frames[0], unpack_record(frames[-1])

    def send(self, connection: bytes, record: ControlRecord, body: bytes = b"", buffers: Sequence[Buffer] = ()) -> None:
        """Send a record, with a codec value behind it where the record says so.

        Raises:
            PeerLostError: the connection is gone.
            BackpressureError: it does not read.
        """
        try:
            self.socket.send(connection, zmq.NOBLOCK | zmq.SNDMORE)
            send_message(self.socket, pack_record(record), [body, *buffers] if body else [], zmq.NOBLOCK)
        except zmq.Again:
            raise BackpressureError(f"control connection {connection.hex()} has left {HIGH_WATER_MARK} records unread") from None
        except zmq.ZMQError as error:
            raise PeerLostError(f"control connection {connection.hex()}: {error}") from error

    def close(self) -> None:
        self.socket.close(0)


class ControlClient:
    """A rank's end of the control socket. One client for each thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.socket = open_socket(context, zmq.DEALER)
        self.socket.connect(endpoint)

    def send(self, record: ControlRecord) -> None:
        """Send a record; raises PeerLostError when the driver has stopped reading for a minute."""
        try:
            self.socket.send(pack_record(record))
        except zmq.Again:
            raise PeerLostError(f"the driver has read no control record for {SEND_TIMEOUT_MS // 1000} s") from None

    def receive(self, timeout_s: float) -> tuple[ControlRecord, list[zmq.Frame | bytes]]:
        """Wait for a record; returns it and the frames behind it.

        Raises:
            PeerLostError: none within ``timeout_s``.
        """
        if not self.socket.poll(max(0, int(timeout_s * 1000)), zmq.POLLIN):
            raise PeerLostError(f"no answer of the driver on the control socket within {timeout_s:g} s")
        first, *rest = receive_message(self.socket)
        assert isinstance(first, bytes)
        return unpack_record(first), rest

    def close(self) -> None:
        self.socket.close(0)
