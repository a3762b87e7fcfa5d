"""Opening ZeroMQ sockets, and sending and receiving whole messages on them; the ends in ``sockets`` and ``control_sockets`` use it.

Over TCP a socket has keys (``security``, ``door``) and its messages travel in parts (``chunks``). High-water marks are an assertion, never
flow control: small ones lose messages even to an idle subscriber (libzmq hands read credits back in batches), so back-pressure is the
business of ``window.CreditWindow``.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from ..errors import InsecureEndpointError, InternalError, LaunchError
from .chunks import CHUNK_BYTES, join_parts, split_frame
from .door import Door, secure_server
from .frames import Buffer
from .security import RankKeys, needs_keys, secure_client

HIGH_WATER_MARK = 1024
COPY_BELOW_BYTES = 256 << 10  # below this a copy is cheaper than tracking the buffer
SEND_TIMEOUT_MS = 60_000  # of sends that may wait; by then the driver has not read 1,024 messages for a minute


def open_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, linger_ms: int = 0) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, linger_ms)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
    return socket


def bind_socket(socket: zmq.Socket[bytes], endpoint: str, name: str, door: Door | None) -> str:
    """Bind the driver's socket ``name``, and return the endpoint to connect to; closes the socket when it raises.

    Raises:
        InsecureEndpointError: TCP without a door.
        LaunchError: it cannot be bound.
    """
    try:
        if not needs_keys(endpoint):
            socket.bind(endpoint)
            return endpoint
        secure_server(socket, endpoint, door, name)
        socket.bind(endpoint)
        return str(socket.getsockopt_string(zmq.LAST_ENDPOINT))
    except InsecureEndpointError:
        socket.close(0)
        raise
    except zmq.ZMQError as error:
        socket.close(0)
        where = "that the address is this host's" if needs_keys(endpoint) else "that its directory exists and has room"
        raise LaunchError(f"cannot bind {endpoint}: {error}; see {where}") from error


def connect_socket(socket: zmq.Socket[bytes], endpoint: str, name: str, keys: RankKeys | None) -> None:
    """Connect a rank's socket ``name``; closes it when it raises InsecureEndpointError, as ``secure_client`` does."""
    try:
        secure_client(socket, endpoint, name, keys)
    except InsecureEndpointError:
        socket.close(0)
        raise
    socket.connect(endpoint)


def send_message(socket: zmq.Socket[bytes], head: Buffer, buffers: Sequence[Buffer], flags: int = 0) -> list[zmq.MessageTracker]:
    """Send one message; returns trackers of the buffers that were not copied, done once ZeroMQ has let go of them."""
    if not buffers:
        socket.send(head, flags)
        return []
    trackers = []
    socket.send(head, flags | zmq.SNDMORE)
    for index, buffer in enumerate(buffers):
        part_flags = flags | (zmq.SNDMORE if index + 1 < len(buffers) else 0)
        if is_sent_in_place(buffer):
            tracker = socket.send(buffer, part_flags, copy=False, track=True)
            if tracker is None:
                raise InternalError("pyzmq gave no tracker of a message that it was told to track")
            trackers.append(tracker)
        else:
            socket.send(buffer, part_flags)
    return trackers


def is_sent_in_place(buffer: Buffer) -> bool:
    """Whether ZeroMQ reads this buffer where it lies, as long as it needs to, instead of taking a copy."""
    return len(buffer) >= COPY_BELOW_BYTES


def receive_message(socket: zmq.Socket[bytes], flags: int = 0) -> list[zmq.Frame | bytes]:
    part = socket.recv(flags, copy=False)  # tells of more at half of what it costs to ask for RCVMORE
    frames: list[zmq.Frame | bytes] = [part]
    while part.more:  # the other parts of a message are there once its first is
        part = socket.recv(copy=False)
        frames.append(part)
    return frames


def send_chunked(socket: zmq.Socket[bytes], head: Buffer, buffers: Sequence[Buffer], flags: int = 0) -> list[zmq.MessageTracker]:
    """As ``send_message``, over TCP: frames in parts."""
    if not buffers and len(head) < CHUNK_BYTES:
        socket.send(head, flags)
        return []
    first, *rest = [part for frame in (head, *buffers) for part in split_frame(frame)]
    return send_message(socket, first, rest, flags)


def receive_parts(socket: zmq.Socket[bytes], flags: int = 0) -> list[zmq.Frame]:
    """Return the parts of the next message, each with what is known of its connection."""
    part = socket.recv(flags, copy=False)
    parts = [part]
    while part.more:
        part = socket.recv(copy=False)
        parts.append(part)
    return parts


def receive_chunked(socket: zmq.Socket[bytes], flags: int = 0) -> list[zmq.Frame | bytes]:
    """As ``receive_message``, over TCP; raises BadFrameError for parts that make no frames."""
    return join_parts(receive_parts(socket, flags))
