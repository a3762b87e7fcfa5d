"""The ends of the step and result sockets, blocking or not, without an event loop; ``control_sockets`` has those of the third.

    driver                          rank
    StepPublisher   XPUB  ------->  SUB     StepSubscriber
    ResultCollector PULL  <-------  PUSH    ResultPusher
    ControlServer   ROUTER <----->  DEALER  ControlClient

The driver binds, at one endpoint or at two: in the run directory and on TCP. Over TCP a rank's end needs ``keys``, and the driver's a
``door``. What the driver's ends read takes the index of the socket that has something.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import zmq

from ..errors import BackpressureError, PeerLostError, ProtocolError, StepGapError
from .bound_sockets import BoundSocket, bind_sockets, close_sockets
from .chunks import join_parts
from .door import Door
from .frames import (
    RANK_LETTER,
    STEP_TOPIC,
    Buffer,
    ResultFrame,
    ResultKind,
    StepFrame,
    StepKind,
    pack_result_header,
    pack_step_header,
    parse_result,
    parse_step,
    rank_topic,
)
from .messages import (
    HIGH_WATER_MARK,
    SEND_TIMEOUT_MS,
    connect_socket,
    is_sent_in_place,
    open_socket,
    receive_chunked,
    receive_message,
    receive_parts,
    send_chunked,
    send_message,
)
from .security import RankKeys, needs_keys

RESULT_LINGER_MS = 1000
_NOBLOCK = int(zmq.NOBLOCK)  # a tenth of a microsecond a message less than the enum's member


class StepPublisher:
    """The driver's end of the step socket: publishes each frame once, numbered, to every rank.

    It keeps a frame until ``forget``: a rank that missed it gets it again.

    Attributes:
        endpoints: those that are bound, in the order of the argument; ``sockets`` likewise.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoints: Sequence[str], *, epoch: int, door: Door | None = None) -> None:
        # verbose: a rank that subscribes to another's topic first must not hide the other's own subscription
        self._bound = bind_sockets(context, zmq.XPUB, endpoints, "step", door, zmq.XPUB_NODROP, zmq.XPUB_VERBOSE)
        self.endpoints = [bound.endpoint for bound in self._bound]
        self.sockets = [bound.socket for bound in self._bound]
        self._places: dict[int, int] = {}  # by rank, the index of the socket on which it listens
        self.epoch = epoch
        self.next_seq = 0
        self.sent_bytes = 0
        self.replayed = 0
        self._kept: deque[tuple[bytes, Sequence[Buffer]]] = deque()
        self._first_kept = 0

    def publish(self, kind: StepKind, body: bytes = b"", buffers: Sequence[Buffer] = ()) -> int:
        """Send one frame to every subscriber and return its seq; never waits.

        Buffers that are sent in place must not change until ``forget``; the others are the caller's when it returns.

        Raises:
            BackpressureError: a subscriber's pipe is full although the window had room; nothing was sent. Where the other socket has
                sent the frame by then it is published all the same: the ranks that it did not reach ask for it as for any lost one.
        """
        head = pack_step_header(kind, self.epoch, self.next_seq) + body
        # those that are not sent in place are the caller's again
        kept = [buffer if is_sent_in_place(buffer) else bytes(buffer) for buffer in buffers] if buffers else ()
        self._send(head, kept, self._bound)
        self._kept.append((head, kept))
        self.next_seq += 1
        return self.next_seq - 1

    def tick(self) -> None:
        """Tell every rank the number of the last frame; raises BackpressureError as ``publish`` does."""
        self._send(pack_step_header(StepKind.TICK, self.epoch, self.next_seq - 1), (), self._bound)

    def forget(self, seq: int) -> None:
        """Let go of the frames before ``seq``, which every rank has acknowledged."""
        while self._first_kept < seq:
            self._kept.popleft()
            self._first_kept += 1

    def replay(self, rank: int, seq: int) -> int:
        """Send frame ``seq`` and all that followed it again, to one rank, and return how many these are.

        Raises:
            StepGapError: that frame is not kept any more, or has not been published.
            BackpressureError: the rank does not read.
        """
        if not self._first_kept <= seq < self.next_seq:
            raise StepGapError(expected=seq, got=self._first_kept, rank=rank)
        missed = list(self._kept)[seq - self._first_kept :]
        place = self._places.get(rank)
        bound = self._bound if place is None else self._bound[place : place + 1]
        for head, buffers in missed:
            self._send(rank_topic(rank) + head, buffers, bound)
        self.replayed += len(missed)
        return len(missed)

    def _send(self, head: bytes, buffers: Sequence[Buffer], to: Sequence[BoundSocket]) -> None:
        num_sent = 0
        for bound in to:
            try:
                bound.send(bound.socket, head, buffers, _NOBLOCK)
            except zmq.Again:
                bound.socket.getsockopt(zmq.EVENTS)  # lets libzmq take in read credits that had not been seen yet
                try:
                    bound.send(bound.socket, head, buffers, _NOBLOCK)
                except zmq.Again:
                    if num_sent:
                        continue
                    raise BackpressureError(
                        f"frame {self.next_seq}: a rank's pipe holds {HIGH_WATER_MARK} unread messages; it has stopped reading"
                    ) from None
            num_sent += 1
        self.sent_bytes += len(head) + sum(map(len, buffers)) if buffers else len(head)

    def read_subscription(self, index: int = 0) -> tuple[int, bool] | None:
        """Return the next (rank, joined) that arrived on a socket, or None for a topic that is not the rank's own, or no rank's.

        Raises:
            zmq.Again: nothing has arrived.
        """
        bound = self._bound[index]
        part, *_ = receive_parts(bound.socket, _NOBLOCK)
        message = part.bytes
        if len(message) != 4 or message[1:2] != RANK_LETTER:
            return None
        rank, has_joined = int.from_bytes(message[2:], "big"), message[0] == 1
        if has_joined:
            # that of a peer that has gone is made by libzmq, and of no connection
            if bound.door is not None and not bound.door.may_subscribe(part, rank):
                return None
            self._places[rank] = index
        return rank, has_joined

    def close(self) -> None:
        """Close the sockets and let go of every frame; idempotent."""
        self.forget(self.next_seq)
        close_sockets(self._bound)


class StepSubscriber:
    """A rank's end of the step socket: every frame, in order, or an error.

    A frame that was lost is asked for by ``on_gap`` with its number; what arrived beyond it is held until it is there.

    Args:
        is_relayed: whether ``endpoint`` is that of a relay, within the node: its frames come in parts, as they came to it.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        *,
        epoch: int,
        rank: int,
        on_gap: Callable[[int], None],
        keys: RankKeys | None = None,
        is_relayed: bool = False,
    ) -> None:
        self._receive_message = receive_chunked if is_relayed or needs_keys(endpoint) else receive_message
        self.socket = open_socket(context, zmq.SUB)
        # once the driver sees the rank's own topic, the common one is active for it: see RANK_LETTER
        self.socket.subscribe(STEP_TOPIC)
        self.socket.subscribe(rank_topic(rank))
        connect_socket(self.socket, endpoint, "step", keys)
        self.epoch = epoch
        self.rank = rank
        self.next_seq = 0
        self.dropped_foreign = 0
        self.dropped_duplicates = 0
        self.gaps = 0
        self._on_gap = on_gap
        self._asked_for = -1
        self._held: dict[int, StepFrame] = {}
        self._timeout_ms = -1

    def receive(self, timeout_ms: int) -> StepFrame | None:
        """Wait for the next frame; None when ``timeout_ms`` passed without any.

        Frames of another epoch and duplicates are dropped and counted.

        Raises:
            StepGapError: more frames beyond a missing one than a driver may have in flight. The rank must not go on: it would enter
                a collective out of turn.
            BadFrameError, WireVersionError: as ``parse_step``.
        """
        if timeout_ms != self._timeout_ms:
            self.socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self._timeout_ms = timeout_ms
        while True:
            held = self._held.pop(self.next_seq, None) if self._held else None
            if held is not None:
                self.next_seq += 1
                return held
            frame = self._read()
            if frame is None:
                return None
            if frame.epoch != self.epoch:
                self.dropped_foreign += 1
            elif frame.kind is StepKind.TICK:
                if frame.seq >= self.next_seq:
                    self._ask_again()
            elif frame.seq == self.next_seq:
                self.next_seq += 1
                return frame
            elif frame.seq < self.next_seq:
                self.dropped_duplicates += 1
            else:
                self._hold(frame)

    def _read(self) -> StepFrame | None:
        """Return the next message of the socket, whichever it is; None when the timeout passed without one."""
        try:
            return parse_step(self._receive_message(self.socket))
        except zmq.Again:
            return None

    def _hold(self, frame: StepFrame) -> None:
        """Keep a frame that came too early, and ask for the missing one, once: a TICK has it asked for again."""
        if frame.seq in self._held:
            self.dropped_duplicates += 1
        elif len(self._held) >= HIGH_WATER_MARK:
            raise StepGapError(expected=self.next_seq, got=frame.seq, rank=self.rank)
        else:
            self._held[frame.seq] = frame
        if self._asked_for != self.next_seq:
            self._ask_again()

    def _ask_again(self) -> None:
        self.gaps += self._asked_for != self.next_seq
        self._asked_for = self.next_seq
        self._on_gap(self.next_seq)

    def close(self) -> None:
        self.socket.close(0)


class ResultPusher:
    """A rank's end of the result socket."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, *, epoch: int, rank: int, keys: RankKeys | None = None
    ) -> None:
        self._send_message = send_chunked if needs_keys(endpoint) else send_message
        self.socket = open_socket(context, zmq.PUSH, RESULT_LINGER_MS)
        connect_socket(self.socket, endpoint, "result", keys)
        self.epoch = epoch
        self.rank = rank

    def push(
        self,
        kind: ResultKind,
        seq: int,
        body: bytes = b"",
        buffers: Sequence[Buffer] = (),
        *,
        busy_us: int = 0,
        received_ns: int = 0,
    ) -> None:
        """Send one answer; the buffers are the caller's again when it returns.

        So it waits until the driver has taken large buffers, and while its pipe is full, which the credit window rules out in health.

        Raises:
            PeerLostError: the driver has stopped reading for a minute.
        """
        try:
            head = pack_result_header(kind, self.epoch, seq, self.rank, busy_us, received_ns)
            for tracker in self._send_message(self.socket, head + body, buffers):
                tracker.wait(SEND_TIMEOUT_MS / 1000)
        except (zmq.Again, zmq.NotDone):
            raise PeerLostError(f"the driver has read no answer for {SEND_TIMEOUT_MS // 1000} s") from None

    def close(self, linger_ms: int = RESULT_LINGER_MS) -> None:
        self.socket.close(linger_ms)


class ResultCollector:
    """The driver's end of the result socket.

    Attributes:
        endpoints: those that are bound, in the order of the argument; ``sockets`` likewise.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoints: Sequence[str], *, epoch: int, door: Door | None = None) -> None:
        self._bound = bind_sockets(context, zmq.PULL, endpoints, "result", door)
        self.endpoints = [bound.endpoint for bound in self._bound]
        self.sockets = [bound.socket for bound in self._bound]
        self.epoch = epoch
        self.dropped_foreign = 0

    def receive(self, index: int = 0) -> ResultFrame | None:
        """Return the next answer on a socket, or None for one that is dropped and counted: of another epoch, or in another's name.

        Raises:
            zmq.Again: nothing has arrived.
            BadFrameError, WireVersionError: as ``parse_result``.
        """
        bound = self._bound[index]
        if bound.door is None:
            frame = parse_result(receive_message(bound.socket, _NOBLOCK))
        else:
            own = _receive_authenticated(bound.socket, bound.door)
            if own is None:
                return None
            frame = own
        if frame.epoch != self.epoch:
            self.dropped_foreign += 1
            return None
        return frame

    def close(self) -> None:
        close_sockets(self._bound)


def _receive_authenticated(socket: zmq.Socket[bytes], door: Door) -> ResultFrame | None:
    """Return the next answer; None for one that claims another rank than its connection proves."""
    parts = receive_parts(socket, _NOBLOCK)
    sender = door.sender(parts[0], "result")
    try:
        frame = parse_result(join_parts(parts))
    except ProtocolError as error:
        raise type(error)(f"on the connection of rank {sender}: {error}") from error
    if sender == frame.rank or door.is_own(sender, frame.rank, f"a {frame.kind.name} of frame {frame.seq}"):
        return frame
    return None
