"""The frames of a group that are on their way: published in order within the window, and their answers counted down.

Each step is encoded once and published once. Answers are taken in the reader's callback, so a step costs one object and one wake-up
however many ranks there are. Nothing here starts, ends or blames a process.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import InternalError, ProtocolError, ZspmdError
from ...transport.codec import ValueEncoder, decode_value
from ...transport.frames import Buffer, ResultFrame, ResultKind, StepKind
from ...transport.messages import is_sent_in_place
from ...transport.records import Failure, unpack_record
from ...transport.window import CreditWindow
from .gate import WindowGate
from .pending import PendingReply
from .processes import GroupProcesses
from .statistics import GroupStatistics
from .ticker import Ticker


class StepStream:
    """Publishes frames and takes what ranks answer to them; belongs to one event loop from ``open`` on.

    Args:
        on_overdue: gets each step or call that is not answered in time, with the ranks that have not done it; it is to end in ``give_up``.
        call_error: returns the error of a call that raised on a rank.
    """

    def __init__(
        self,
        processes: GroupProcesses,
        *,
        window: int,
        num_ranks: int,
        on_overdue: Callable[[PendingReply, Sequence[int]], None],
        call_error: Callable[[int, Failure], ZspmdError],
    ) -> None:
        self.statistics = GroupStatistics()
        self._processes = processes
        self._on_overdue = on_overdue
        self._call_error = call_error
        self._encoder = ValueEncoder()
        self._window = CreditWindow(size=window, num_ranks=num_ranks)
        self._gate = WindowGate(self._window)
        self._all_ranks = range(num_ranks)
        self._pending: dict[int, PendingReply] = {}
        self._step_id: int | None = None  # of the step that was published last
        self._step_ids: deque[int | None] = deque()  # the same at each frame in flight, oldest first
        self._replayed: dict[int, tuple[int, int]] = {}  # by rank: the frame it missed last, and how many ticks there had been

    @property
    def in_flight(self) -> int:
        """Frames that some rank has not acknowledged."""
        return self._window.in_flight

    @property
    def has_waiters(self) -> bool:
        """Whether somebody waits for room."""
        return self._gate.has_waiters

    @property
    def pending(self) -> list[PendingReply]:
        """Steps and calls whose answers are not all there."""
        return list(self._pending.values())

    def missing(self, seq: int) -> list[int]:
        """Return the ranks that have not acknowledged frame ``seq``."""
        return self._window.missing(seq)

    def step_of(self, rank: int) -> int | None:
        """Return the step that a rank is at: the first that it has not acknowledged, or the last if it has done all; None before it."""
        place = self._window.due(rank) - self._window.oldest
        return self._step_ids[place] if place < len(self._step_ids) else self._step_id

    @property
    def window(self) -> CreditWindow:
        """What is in flight, and which rank has acknowledged what."""
        return self._window

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind to the loop that everything is called on."""
        self._loop = loop
        self._ticker = Ticker(loop, self._window, self._processes.tick)

    async def wait_for_room(self, timeout_s: float) -> None:
        """Return when the caller may ask, which it must do at once; raises as ``WindowGate.wait``."""
        await self._gate.wait(timeout_s)

    def ask(self, kind: StepKind, value: Any, step_id: int | None, ranks: Sequence[int], timeout_s: float) -> PendingReply:
        """Publish a step or call that ``ranks`` answer, within the room that was waited for.

        Raises:
            TypeError, ValueError: something in ``value`` may not travel; the room goes to the next in line.
        """
        asked_ns = time.monotonic_ns()
        try:
            body, buffers = self._encoder.encode(value)
            published_ns = time.monotonic_ns()
            seq = self.publish(kind, body, buffers, step_id)
        except BaseException:
            self._gate.grant()
            raise
        awaited = self._all_ranks if any(map(is_sent_in_place, buffers)) else ranks
        pending = PendingReply(self._loop, seq, step_id, ranks, awaited=awaited, asked_ns=asked_ns, published_ns=published_ns)
        pending.expire_after(timeout_s, self._expired)
        self._pending[seq] = pending
        return pending

    def publish(self, kind: StepKind, body: bytes = b"", buffers: Sequence[Buffer] = (), step_id: int | None = None) -> int:
        """Publish one frame, window or not, and return its number."""
        seq = self._processes.publish(kind, body, buffers)
        self._window.opened(seq)
        self._step_id = self._step_id if step_id is None else step_id
        self._step_ids.append(self._step_id)
        self._ticker.arm()
        return seq

    def take(self, frame: ResultFrame) -> None:
        """Take one answer, or send again what a rank has missed.

        Raises:
            StepGapError, BackpressureError: it cannot be sent again.
            AnswerLostError: an earlier answer of the rank never came.
            ProtocolError, InternalError: an acknowledgement or answer that breaks the protocol.
        """
        kind = frame.kind
        if kind is ResultKind.GAP:
            self._replay(frame.rank, frame.seq)
            return
        if self._window.acknowledged(frame.rank, frame.seq):
            self._processes.publisher.forget(self._window.oldest)
            while len(self._step_ids) > self._window.in_flight:
                self._step_ids.popleft()
            self._ticker.moved()
            self._gate.grant()
        if kind is ResultKind.OUTPUT or kind is ResultKind.REPLY:
            self._answer(frame, decode_value(frame.body, frame.buffers))
        elif kind is ResultKind.ACK:
            pending = self._pending.get(frame.seq)
            if pending is not None and frame.rank in pending.awaited:
                self._take_answer(pending, frame, None)
        elif kind is ResultKind.CALL_ERROR:
            pending = self._pending.pop(frame.seq, None)
            if pending is None:
                self.statistics.late_answers += 1
            else:
                pending.fail(self._call_error(frame.rank, read_failure(frame)))

    def _replay(self, rank: int, seq: int) -> None:
        """Send again once a tick: a rank that was busy answers every tick that has piled up with the same GAP."""
        asked = (seq, self._ticker.num_ticks)
        if self._replayed.get(rank) != asked:
            self._processes.replay(rank, seq)
            self._replayed[rank] = asked
            self._ticker.moved()

    async def drain(self, timeout_s: float) -> None:
        """Wait for the answers on their way; whoever awaits them gets the outcome, so it is of no interest here."""
        if self._pending:
            await asyncio.wait([pending.wait_done() for pending in self._pending.values()], timeout=timeout_s)

    def give_up(self, pending: PendingReply, error: ZspmdError) -> None:
        """Wait no longer for the answers to a step or call: its await raises ``error``, unless they have come by now."""
        if self._pending.get(pending.seq) is pending:
            del self._pending[pending.seq]
            pending.fail(error)

    def fail(self, error: ZspmdError) -> None:
        """Raise ``error`` from every await of an answer or of room."""
        for pending in self._pending.values():
            pending.fail(error)
        self._pending.clear()
        self._gate.fail(error)

    def close(self) -> None:
        """Stop the ticker; idempotent."""
        self._ticker.close()

    def _answer(self, frame: ResultFrame, value: Any) -> None:
        pending = self._pending.get(frame.seq)
        if pending is None:
            self.statistics.late_answers += 1
        else:
            self._take_answer(pending, frame, value)

    def _take_answer(self, pending: PendingReply, frame: ResultFrame, value: Any) -> None:
        if (frame.rank in pending.ranks) is (frame.kind is ResultKind.ACK):
            raise ProtocolError(f"an {frame.kind.name}; the ranks that answer are {', '.join(map(str, pending.ranks))}")
        if pending.answer(frame.rank, value):
            del self._pending[frame.seq]
            self.statistics.record(pending.asked_ns, pending.published_ns, frame.received_ns, frame.busy_us)

    def _expired(self, pending: PendingReply) -> None:
        self._on_overdue(pending, self._window.missing(pending.seq) or pending.missing)


def read_failure(frame: ResultFrame) -> Failure:
    """Return why a rank gives up, or why a call raised, from the body of its frame.

    Raises:
        BadFrameError: the body is no record.
        InternalError: it is another record.
    """
    record = unpack_record(frame.body)
    if not isinstance(record, Failure):
        raise InternalError(f"rank {frame.rank} sent a {type(record).__name__} as the reason of a failure")
    return record
