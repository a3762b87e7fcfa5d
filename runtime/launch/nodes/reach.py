"""The proof that one machine reaches another by TCP: a listener that gives back what it is sent, and the attempt to have that from it."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import cast

NONCE_BYTES = 32
MAX_CONNECTIONS = 1024
_BACKLOG = 1024
# Whoever connects has its whole say at once.
_SAY_S = 5.0


class Listener:
    """Gives a nonce back to whoever connects to one address of this machine, at a port of the kernel's choice, and hangs up.

    It says nothing of its own, reads no more than a nonce, and holds a bounded number of connections: those above it are closed unread.
    """

    def __init__(self, address: str, max_connections: int = MAX_CONNECTIONS) -> None:
        self.address = address
        self.max_connections = max_connections
        self._server: asyncio.Server | None = None
        self._connections: set[_Echo] = set()

    async def open(self) -> int:
        """Listen, and return the port.

        Raises:
            OSError: ``address`` is no address of this machine, or descriptors have run out.
        """
        listener = socket.socket(_family(self.address), socket.SOCK_STREAM)
        try:
            listener.bind((self.address, 0))
            listener.setblocking(False)
            self._server = await asyncio.get_running_loop().create_server(lambda: _Echo(self), sock=listener, backlog=_BACKLOG)
        except OSError:
            listener.close()
            raise
        return int(listener.getsockname()[1])

    def close(self) -> None:
        """Stop listening and end the connections, in the loop's next turn; idempotent."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in list(self._connections):
            connection.end()

    def admit(self, connection: _Echo) -> bool:
        """Count a connection, if there is room for it and this listener is open."""
        if self._server is None or len(self._connections) >= self.max_connections:
            return False
        self._connections.add(connection)
        return True

    def forget(self, connection: _Echo) -> None:
        """Count it no longer."""
        self._connections.discard(connection)


class _Echo(asyncio.Protocol):
    """One connection of a ``Listener``."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._heard = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._timer = asyncio.get_running_loop().call_later(_SAY_S, self.end)
        if not self._listener.admit(self):
            self.end()

    def data_received(self, data: bytes) -> None:
        self._heard += data
        if len(self._heard) >= NONCE_BYTES:
            self._transport.pause_reading()
            self._transport.write(self._heard[:NONCE_BYTES])
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._listener.forget(self)

    def end(self) -> None:
        """Hang up at once."""
        self._transport.abort()


async def reach(address: str, port: int, nonce: bytes, timeout_s: float) -> str:
    """Connect to a ``Listener`` and have ``nonce`` back; return why that failed, or an empty text. Raises nothing.

    Args:
        address: an IP address.
        nonce: ``NONCE_BYTES`` that nobody else can know.
    """
    with socket.socket(_family(address), socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        try:
            heard = await asyncio.wait_for(_exchange(connection, address, port, nonce), timeout_s)
        except asyncio.TimeoutError:
            return f"no answer within {timeout_s:g} s"
        except OSError as error:
            return os.strerror(error.errno) if error.errno else str(error)  # asyncio puts the address in its place
    return "" if heard == nonce else f"another program answers there, or the answer was changed ({len(heard)} B came)"


async def _exchange(connection: socket.socket, address: str, port: int, nonce: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, (address, port))
    await loop.sock_sendall(connection, nonce)
    heard = b""
    while len(heard) < len(nonce) and (data := await loop.sock_recv(connection, len(nonce) - len(heard))):
        heard += data
    return heard


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
