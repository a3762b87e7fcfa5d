"""What lies between the sockets: links that delay, and that lose, double, reorder, garble or cut where the run's options say so."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from .sockets import DEALER, PUSH, ROUTER, SUB, XPUB, Message, SimulatedSocket
from .world import World

SHORT_DELAY_S = (20e-6, 200e-6)


@dataclass
class StepFaults:
    """What becomes of frames on their way to one rank: probabilities of each, and when some were lost."""

    lose: float = 0.0
    double: float = 0.0
    reorder: float = 0.0
    lost_at: list[float] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Link:
    """One direction of a connection, in order: what was sent first arrives first.

    ``topics`` are those that the target has subscribed to, as far as the sending XPUB has heard. ``tampering`` has by the number of a
    message what becomes of it: lose, double, garble, or foreign (one of another launch comes before it).
    """

    network: Network
    source: SimulatedSocket
    target: SimulatedSocket
    identity: bytes = b""
    topics: set[bytes] = field(default_factory=set)
    faults: StepFaults = field(default_factory=StepFaults)
    tampering: dict[int, str] = field(default_factory=dict)
    on_tampered: Callable[[str, Message], None] = lambda what, message: None
    num_sent: int = 0
    queue: deque[Message] = field(default_factory=deque)
    twin: Link | None = None  # the other direction

    @property
    def is_full(self) -> bool:
        return len(self.queue) + len(self.target.inbox) >= self.network.high_water_mark

    def wants(self, head: bytes) -> bool:
        """Whether the target has subscribed to what begins so."""
        return head.startswith(tuple(self.topics))

    def send(self, message: Message) -> None:
        """Put a message on its way, or do to it what the options say."""
        world, faults = self.network.world, self.faults
        what = self.tampering.get(self.num_sent, "") if self.tampering else ""
        self.num_sent += 1
        if what:
            self.on_tampered(what, message)
        if what == "lose" or (faults.lose and world.happens(faults.lose)):
            world.reach("message_lost")
            faults.lost_at.append(world.now)
            return
        if what == "garble":
            message = [b"SZ garbled", *message[1:]]
        elif what == "foreign":
            self._enqueue([message[0][:4] + b"else" + message[0][8:], *message[1:]])  # another epoch
        self._enqueue(message)
        if what == "double" or (faults.double and world.happens(faults.double)):
            world.reach("message_doubled")
            self._enqueue(message)
        if faults.reorder and len(self.queue) > 1 and world.happens(faults.reorder):
            world.reach("messages_reordered")
            self.queue[-1], self.queue[-2] = self.queue[-2], self.queue[-1]

    def _enqueue(self, message: Message) -> None:
        self.queue.append(message)
        self.network.world.after(self.network.delay(), self._arrive)

    def _arrive(self) -> None:
        """Deliver the oldest message; where the target's process is stopped, once it goes on."""
        if not self.queue:
            return  # cut meanwhile
        world, owner = self.network.world, self.target.owner
        goes_on_at = world.driver_stopped_until if owner.is_driver else owner.stopped_until
        if goes_on_at > world.now:
            world.at(goes_on_at + self.network.short_delay(), self._arrive)
            return
        message = self.queue.popleft()
        if self.target.kind == XPUB:
            self._subscribe(bytes(message[0]))
        self.target.deliver(message)

    def _subscribe(self, message: bytes) -> None:
        assert self.twin is not None
        if message[:1] == b"\x01":
            self.twin.topics.add(message[1:])
        else:
            self.twin.topics.discard(message[1:])


class Network:
    """All links of a run, and the endpoints that sockets are bound to.

    Args:
        high_water_mark: messages that an XPUB's pipe holds; libzmq's are set to 1,024 by the package.
        longest_delay_s: of a message, mostly; one in fifty takes up to ``slow_delay_s``.

    Attributes:
        num_open: sockets that were made and not closed.
    """

    def __init__(self, world: World, *, high_water_mark: int, longest_delay_s: float, slow_delay_s: float) -> None:
        self.world = world
        self.high_water_mark = high_water_mark
        self.bound: dict[str, SimulatedSocket] = {}
        self.num_open = 0
        self._longest_delay_s = longest_delay_s
        self._slow_delay_s = slow_delay_s
        self._next_fd = 1_000_000  # no real one
        self._num_connections = 0

    def next_fd(self) -> int:
        self._next_fd += 1
        return self._next_fd

    def opened(self) -> int:
        """Note that there is one more socket, and return its fd."""
        self.num_open += 1
        return self.next_fd()

    def short_delay(self) -> float:
        shortest, longest = SHORT_DELAY_S
        return shortest + (longest - shortest) * self.world.chance.random()

    def delay(self) -> float:
        """Draw how long a message takes."""
        draw = self.world.chance.random
        longest = self._slow_delay_s if draw() < 0.02 else self._longest_delay_s
        return SHORT_DELAY_S[0] + (longest - SHORT_DELAY_S[0]) * draw()

    def bind(self, endpoint: str, socket: SimulatedSocket) -> None:
        if endpoint in self.bound:
            raise zmq.ZMQError(zmq.EADDRINUSE)
        self.bound[endpoint] = socket

    def connect(self, endpoint: str, socket: SimulatedSocket) -> None:
        """Link a socket to the one that is bound there; without one its messages go nowhere."""
        peer = self.bound.get(endpoint)
        if peer is None or peer.closed:
            return
        self._num_connections += 1
        identity = self._num_connections.to_bytes(5, "big")
        up = Link(self, socket, peer, identity)
        down = Link(self, peer, socket, identity)
        up.twin, down.twin = down, up
        socket.links.append(up)
        if peer.kind in (XPUB, ROUTER):
            peer.links.append(down)
        for topic in socket.topics:
            up.send([b"\x01" + topic])

    def disconnect(self, socket: SimulatedSocket, *, keeps_sent: bool) -> None:
        """Cut a connecting socket's link; what is on its way to it is lost, and what it has sent unless ``keeps_sent``."""
        assert socket.kind in (SUB, PUSH, DEALER)
        for up in socket.links:
            down = up.twin
            assert down is not None
            down.queue.clear()
            if not keeps_sent:
                up.queue.clear()
            if down in up.target.links:
                up.target.links.remove(down)
            if up.target.kind == XPUB:  # libzmq tells of the topics that nobody wants any more
                self.world.after(self.short_delay(), up.target.deliver, [b"\x00" + (socket.topics or [b"?"])[-1]])
        socket.links.clear()

    def closed(self, socket: SimulatedSocket) -> None:
        """Note that a socket was closed; what a connecting one has sent still arrives."""
        self.num_open -= 1
        if socket.kind in (SUB, PUSH, DEALER):
            self.disconnect(socket, keeps_sent=True)
        else:
            self.bound = {endpoint: bound for endpoint, bound in self.bound.items() if bound is not socket}
