"""One end of the driver as the sockets behind it: one for the ranks that share the run directory, one for those that come by TCP.

They are two because CURVE belongs to a whole socket: what is in the run directory needs none, and everything on TCP does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from ..errors import ConfigError
from .door import Door
from .frames import Buffer
from .messages import bind_socket, open_socket, send_chunked, send_message
from .security import needs_keys


@dataclass(frozen=True)
class BoundSocket:
    """A socket of the driver that listens at ``endpoint``; ``door`` is None where nobody has to prove who it is.

    ``send(socket, head, buffers, flags)`` sends a message, in parts where the socket takes no large ones.
    """

    socket: zmq.Socket[bytes]
    endpoint: str
    door: Door | None
    send: Callable[[zmq.Socket[bytes], Buffer, Sequence[Buffer], int], object]


def bind_sockets(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoints: Sequence[str], name: str, door: Door | None, *options: int
) -> list[BoundSocket]:
    """Bind a socket of this kind for each endpoint, in their order; closes all of them when it raises.

    Args:
        name: of the end: step, result or control.
        options: of the sockets, that are switched on.

    Raises:
        ConfigError: no endpoint.
        InsecureEndpointError, LaunchError: as ``bind_socket``.
    """
    if isinstance(endpoints, str) or not endpoints:
        raise ConfigError(f"the endpoints of the {name} socket are {endpoints!r}; give a list of one or more")
    bound: list[BoundSocket] = []
    try:
        for endpoint in endpoints:
            socket = open_socket(context, kind)
            for option in options:
                socket.setsockopt(option, 1)
            place = bind_socket(socket, endpoint, name, door)
            is_open = not needs_keys(endpoint)
            bound.append(BoundSocket(socket, place, None if is_open else door, send_message if is_open else send_chunked))
    except Exception:
        close_sockets(bound)
        raise
    return bound


def close_sockets(bound: Sequence[BoundSocket]) -> None:
    """Close all of them at once; idempotent."""
    for one in bound:
        one.socket.close(0)
