"""The way to the agent of a node that has called in, or will."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from ....errors import BadFrameError, LaunchError
from .byte_tunnel import ByteTunnel
from .dial_records import Call, Chunk, Cut, DialRecord, Ended, Finished, Open, Taken


class DialInLink:
    """The way to the agent of a node that calls in; its ``open`` has the node start an agent, now or as soon as it calls."""

    def __init__(self, node_rank: int, send: Callable[[DialRecord, bytes | None], None]) -> None:
        self.node_rank = node_rank
        self.call: Call | None = None
        self.address = ""  # from which it called
        self._send = send
        self._tunnel: ByteTunnel | None = None
        self._ended = asyncio.Event()
        self._way = ""
        self._is_gone = False  # the connection; another agent cannot be had

    @property
    def name(self) -> str:
        """What to call it in messages."""
        where = "which has not called in" if self.call is None else f"pid {self.call.pid} on {self.call.host}"
        return f"node {self.node_rank}, {where}"

    @property
    def tail(self) -> list[str]:
        """Nothing: what the node's process prints, it prints where it was started."""
        return []

    def open(self) -> tuple[int, int]:
        """Have the node start an agent; return the descriptor of its byte stream, twice, which is the caller's from then on.

        Raises:
            LaunchError: the node's connection is lost, or was cut.
        """
        if self._is_gone:
            raise LaunchError(f"{self.name}, is gone: {self._way}")
        assert self._tunnel is None or self._ended.is_set(), "one agent at a time"
        self._ended.clear()
        ours, theirs = socket.socketpair()
        self._tunnel = ByteTunnel(
            ours,
            send=lambda chunk: self._send(Chunk(), chunk),
            grant=lambda: self._send(Taken(), None),
            on_read_end=lambda: self._send(Finished(), None),
            on_written_out=self._settle,
        )
        if self.call is not None:
            self._begin()
        fd = theirs.detach()
        return fd, fd

    async def wait_ended(self, timeout_s: float) -> str | None:
        """Wait for the agent's end, or the loss of its node, and say how it was; None where it has not ended."""
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        except asyncio.TimeoutError:
            return None
        return f"{self.name}: {self._way}"

    def kill(self) -> None:
        """Give the node up: it finds its driver gone, and ends its agent; idempotent."""
        if self.call is not None and not self._is_gone:
            self._send(Cut(), None)
        self.lose("it was given up")
        self.close()

    def accept(self, call: Call, address: str) -> None:
        """Take the node's call, which came from an IP address."""
        self.call, self.address = call, address
        if self._tunnel is not None and not self._is_gone:
            self._begin()

    def handle(self, record: DialRecord, chunk: bytes) -> None:
        """Take a record of the node's; raises BadFrameError for one that it must not send now."""
        if self._tunnel is None or self._ended.is_set():
            return  # of an agent that was given up
        if isinstance(record, Chunk):
            self._tunnel.receive(chunk)
        elif isinstance(record, Taken):
            self._tunnel.granted()
        elif isinstance(record, Ended):
            self._way = record.reason
            self._tunnel.finish()
        else:
            raise BadFrameError(f"a {type(record).__name__} was not expected")

    def lose(self, way: str) -> None:
        """Take the node for gone."""
        if self._is_gone:
            return
        self._is_gone = True
        if not self._ended.is_set():
            self._way = way
        if self._tunnel is None:
            self._ended.set()
        else:
            self._tunnel.finish()  # what came before is still read

    def close(self) -> None:
        """Close this end of the byte stream; idempotent."""
        if self._tunnel is not None:
            self._tunnel.close()
        self._ended.set()

    @property
    def loss(self) -> str:
        """How the node was lost, or nothing."""
        return self._way if self._is_gone else ""

    def _begin(self) -> None:
        assert self._tunnel is not None, "it is being opened"
        self._send(Open(), None)
        self._tunnel.open()

    def _settle(self) -> None:
        assert self._tunnel is not None, "it is written out"
        self._tunnel.close()
        self._ended.set()
