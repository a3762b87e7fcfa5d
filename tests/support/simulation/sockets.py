"""ZeroMQ as far as the package uses it, over virtual time: the same calls and the same edges of the fd, but no thread and no bytes.

An fd becomes readable when a message reaches a socket that had found itself empty, and any ``send``, ``recv`` or look at EVENTS takes
that edge away, whatever is left unread. So a reader that forgets to look again sleeps for ever here, as it does on libzmq.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import zmq

if TYPE_CHECKING:
    from .network import Link, Network

SNDMORE, POLLIN, POLLOUT = int(zmq.SNDMORE), int(zmq.POLLIN), int(zmq.POLLOUT)
XPUB, SUB, PULL, PUSH, ROUTER, DEALER = (int(kind) for kind in (zmq.XPUB, zmq.SUB, zmq.PULL, zmq.PUSH, zmq.ROUTER, zmq.DEALER))
FD, EVENTS, RCVMORE = int(zmq.FD), int(zmq.EVENTS), int(zmq.RCVMORE)

Message = list[Any]  # of parts: bytes, or what was sent from where it lies


class NothingThere(zmq.Again):
    """``zmq.Again`` without its text, which takes longer than all else about an empty socket."""

    def __init__(self) -> None:
        self.errno = zmq.EAGAIN
        self.strerror = "nothing has arrived"


class SimulatedFrame:
    """A part that was received without a copy; ``more`` says whether another follows."""

    __slots__ = ("buffer", "more")

    def __init__(self, data: Any, more: bool) -> None:
        self.buffer = memoryview(data)
        self.more = more

    @property
    def bytes(self) -> bytes:
        return self.buffer.tobytes()


class SentTracker:
    """Says that ZeroMQ has let go of a buffer: here it does so at once, since messages keep what they were sent."""

    done = True

    def wait(self, timeout: float | None = None) -> None:
        return


class SimulatedSocket:
    """One end; ``on_message`` is called when something has arrived, for an owner that has no event loop."""

    def __init__(self, network: Network, kind: int, owner: SimulatedContext) -> None:
        self.kind = int(kind)
        self.closed = False
        self.owner = owner
        self.inbox: deque[Message] = deque()
        self.topics: list[bytes] = []
        self.links: list[Link] = []  # to the peers, in the order of their connecting
        self.on_message: Callable[[], None] = lambda: None
        self._network = network
        self._fd = network.opened()
        self._is_asleep = True  # it has seen itself empty: the next message makes an edge
        self._incoming: deque[Any] = deque()  # the rest of the message that is being read
        self._outgoing: Message = []
        self._routed: Link | None = None

    def setsockopt(self, option: int, value: int) -> None:
        """Take an option; none that the package sets changes what is simulated."""

    def getsockopt(self, option: int) -> int:
        if option == RCVMORE:
            return bool(self._incoming)
        if option == FD:
            return self._fd
        assert option == EVENTS, f"option {option} is not simulated"
        self._take_edge()
        if not self.inbox:
            self._is_asleep = True
        return POLLOUT | (POLLIN if self.inbox else 0)

    def bind(self, endpoint: str) -> None:
        self._network.bind(endpoint, self)

    def connect(self, endpoint: str) -> None:
        self._network.connect(endpoint, self)

    def subscribe(self, topic: bytes) -> None:
        self.topics.append(topic)

    def poll(self, timeout: int, flags: int = 0) -> int:
        return POLLIN if self.inbox else 0

    def recv(self, flags: int = 0, copy: bool = True) -> Any:
        self.owner.readable.pop(self._fd, None)
        if not self._incoming:
            if not self.inbox:
                self._is_asleep = True
                raise NothingThere
            self._incoming.extend(self.inbox.popleft())
        part = self._incoming.popleft()
        return bytes(part) if copy else SimulatedFrame(part, more=bool(self._incoming))

    def recv_multipart(self, flags: int = 0) -> list[bytes]:
        parts = [self.recv(flags)]
        while self._incoming:
            parts.append(self.recv(flags))
        return parts

    def send(self, data: Any, flags: int = 0, copy: bool = True, track: bool = False) -> SentTracker | None:
        self.owner.readable.pop(self._fd, None)
        if not self._outgoing:
            self._check_room(data)
        self._outgoing.append(bytes(data) if copy else data)
        if not int(flags) & SNDMORE:
            message, self._outgoing = self._outgoing, []
            self._dispatch(message)
        return SentTracker() if track else None

    def close(self, linger: int | None = None) -> None:
        if not self.closed:
            self.closed = True
            self._take_edge()
            self._network.closed(self)

    def deliver(self, message: Message) -> None:
        """Take what has arrived."""
        if self.closed:
            return
        self.inbox.append(message)
        if self._is_asleep:
            self._is_asleep = False
            self.owner.readable[self._fd] = None
        self.on_message()

    def _take_edge(self) -> None:
        self.owner.readable.pop(self._fd, None)

    def _check_room(self, first: Any) -> None:
        if self.kind == XPUB:
            if any(link.is_full and link.wants(first) for link in self.links):
                self._network.world.reach("pipe_full")
                raise zmq.Again
        elif self.kind == ROUTER:
            self._routed = next((link for link in self.links if link.identity == first), None)
            if self._routed is None:
                raise zmq.ZMQError(zmq.EHOSTUNREACH)

    def _dispatch(self, message: Message) -> None:
        if self.kind == XPUB:
            for link in list(self.links):
                if link.wants(message[0]):
                    link.send(message)
        elif self.kind == ROUTER:
            assert self._routed is not None
            self._routed.send(message[1:])
        else:
            for link in self.links:  # a connecting socket has one, or none once its peer has closed
                link.send([link.identity, *message] if self.kind == DEALER else message)


class SimulatedContext:
    """The sockets of one process; ``readable`` has its fds that have an edge."""

    def __init__(self, network: Network, readable: dict[int, None] | None = None) -> None:
        self.readable: dict[int, None] = {} if readable is None else readable
        self.sockets: list[SimulatedSocket] = []
        self.is_driver = readable is not None
        self.stopped_until = 0.0  # a rank's process, and with it the thread that takes messages in
        self._network = network

    def socket(self, kind: int) -> SimulatedSocket:
        self.sockets.append(SimulatedSocket(self._network, kind, self))
        return self.sockets[-1]

    def destroy(self, linger: int | None = None) -> None:
        for socket in self.sockets:
            socket.close(linger)
