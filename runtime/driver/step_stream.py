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
from .reply_deadlines import ReplyDeadlines
from .statistics import GroupStatistics
from .ticker import Ticker

_STEP = StepKind.STEP  # a tenth of what asking the enum for its member takes, each time
_OUTPUT, _ACK, _REPLY, _GAP = ResultKind.OUTPUT, ResultKind.ACK, ResultKind.REPLY, ResultKind.GAP


class StepStream:
    """Publishes frames and takes what ranks answer to them; belongs to one event loop from ``open`` on.

    Args:
        output_ranks: who answers steps.
        on_overdue: gets each step or call that is not answered in time, with the ranks that have not done it; it is to end in ``give_up``.
        call_error: returns the error of a call that raised on a rank.
    """

    def __init__(
        self,
        processes: GroupProcesses,
        *,
        window: int,
        num_ranks: int,
        output_ranks: Sequence[int],
        on_overdue: Callable[[PendingReply, Sequence[int]], None],
        call_error: Callable[[int, Failure], ZspmdError],
    ) -> None:
        self._statistics = GroupStatistics()
        self._uncounted: list[tuple[int, int, int, int, int]] = []  # what ``GroupStatistics.record`` takes, once there is time
        self._processes = processes
        self._on_overdue = on_overdue
        self._call_error = call_error
        self._encoder = ValueEncoder()
        self._window = CreditWindow(size=window, num_ranks=num_ranks)
        self.gate = WindowGate(self._window)
        """Where whoever wants to ask waits for room."""
        self._all_ranks = range(num_ranks)
        self._output_ranks = output_ranks
        self._pending: dict[int, PendingReply] = {}
        self._given_up: set[int] = set()  # frames in flight whose await ended before every awaited rank had answered
        self._num_steps = 0
        self._no_steps: deque[int] = deque()  # of the frames in flight, and some before them: calls and what is neither
        self._replayed: dict[int, tuple[int, int]] = {}  # by rank: the frame it missed last, and how many ticks there had been

    @property
    def statistics(self) -> GroupStatistics:
        """The counters and histograms, with every answer that has come."""
        self._count_answers()
        return self._statistics

    @property
    def in_flight(self) -> int:
        """Frames that some rank has not acknowledged."""
        return self._window.in_flight

    @property
    def pending(self) -> list[PendingReply]:
        """Steps and calls whose answers are not all there."""
        return list(self._pending.values())

    def missing(self, seq: int) -> list[int]:
        """Return the ranks that have not acknowledged frame ``seq``."""
        return self._window.missing(seq)

    def step_of(self, rank: int) -> int | None:
        """Return the step that a rank is at: the first that it has not acknowledged, or the last if it has done all; None before it."""
        due = self._window.due(rank)
        num_later = self._window.oldest + self._window.in_flight - 1 - due - sum(seq > due for seq in self._no_steps)
        step_id = self._num_steps - 1 - max(num_later, 0)
        return step_id if step_id >= 0 else None

    @property
    def window(self) -> CreditWindow:
        """What is in flight, and which rank has acknowledged what."""
        return self._window

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind to the loop that everything is called on."""
        self._loop = loop
        self._ticker = Ticker(loop, self._window, self._processes.tick)
        self._deadlines = ReplyDeadlines(loop, self._pending, self._expired)

    def ask(self, kind: StepKind, value: Any, ranks: Sequence[int], timeout_s: float) -> PendingReply:
        """Publish a step or call that ``ranks`` answer, within the room that was waited for, and count it.

        Raises:
            TypeError, ValueError: something in ``value`` may not travel; the room goes to the next in line.
        """
        asked_ns = time.monotonic_ns()
        try:
            body, buffers = self._encoder.encode(value)
            published_ns = time.monotonic_ns()
            seq = self.publish(kind, body, buffers)
        except BaseException:
            self.gate.grant()
            raise
        awaited = self._all_ranks if buffers and any(map(is_sent_in_place, buffers)) else ranks
        step_id = self._count(kind)
        pending = PendingReply(
            self._loop, seq, step_id, ranks, awaited=awaited, asked_ns=asked_ns, published_ns=published_ns, limit_s=timeout_s
        )
        self._pending[seq] = pending
        self._deadlines.watch(pending)
        self._count_answers()  # here, while the ranks are busy, it delays no step
        return pending

    def _count_answers(self) -> None:
        for answer in self._uncounted:
            self._statistics.record(*answer)
        self._uncounted.clear()
        if self._given_up:
            self._given_up = {seq for seq in self._given_up if seq >= self._window.oldest}

    def _count(self, kind: StepKind) -> int | None:
        """Count a step, and return its id, or a call."""
        if kind is not _STEP:
            self._statistics.calls += 1
            return None
        self._num_steps += 1
        self._statistics.steps = self._num_steps
        return self._num_steps - 1

    def publish(self, kind: StepKind, body: bytes = b"", buffers: Sequence[Buffer] = ()) -> int:
        """Publish one frame, window or not, and return its number."""
        seq = self._processes.publish(kind, body, buffers)
        self._window.opened(seq)
        if kind is not _STEP:
            while self._no_steps and self._no_steps[0] < self._window.oldest:
                self._no_steps.popleft()
            self._no_steps.append(seq)
        self._ticker.arm()
        return seq

    def take(self, frame: ResultFrame) -> bool:
        """Take one answer, or send again what a rank has missed; returns whether it was the last that an await was waiting for.

        Raises:
            StepGapError, BackpressureError: it cannot be sent again.
            AnswerLostError: an earlier answer of the rank never came.
            ProtocolError, InternalError: an acknowledgement or answer that breaks the protocol.
        """
        kind, seq, rank = frame.kind, frame.seq, frame.rank
        if kind is _GAP:
            self._replay(self.known_rank(frame), seq)
            return False
        if self._window.acknowledged(rank, seq):
            self._processes.publisher.forget(self._window.oldest)
            self._ticker.moved()
            self.gate.grant()
        if kind is _OUTPUT or kind is _REPLY:
            value = decode_value(frame.body, frame.buffers)
            pending = self._pending.get(seq)
            if pending is not None:
                return self._take_answer(pending, frame, value)
            self._statistics.late_answers += seq in self._given_up
        elif kind is _ACK:
            pending = self._pending.get(seq)
            return pending is not None and rank in pending.awaited and self._take_answer(pending, frame, None)
        elif kind is ResultKind.CALL_ERROR:
            pending = self._pending.pop(seq, None)
            if pending is None:
                self._statistics.late_answers += 1
            else:
                self._given_up.add(seq)
                pending.fail(self._call_error(rank, read_failure(frame)))
        return False

    def known_rank(self, frame: ResultFrame) -> int:
        """Return the rank of a frame that acknowledges nothing; raises ProtocolError if there is no such rank."""
        if frame.rank >= len(self._all_ranks):
            raise ProtocolError(f"{frame.kind.name} of rank {frame.rank}; the ranks are 0 to {len(self._all_ranks) - 1}")
        return frame.rank

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
            self._given_up.add(pending.seq)
            pending.fail(error)

    def fail(self, error: ZspmdError) -> None:
        """Raise ``error`` from every await of an answer or of room."""
        for pending in self._pending.values():
            pending.fail(error)
        self._pending.clear()
        self.gate.fail(error)

    def close(self) -> None:
        """Stop the timers; idempotent."""
        self._ticker.close()
        self._deadlines.close()

    def _take_answer(self, pending: PendingReply, frame: ResultFrame, value: Any) -> bool:
        rank = frame.rank
        answering = pending.ranks if pending.step_id is None else self._output_ranks
        if (rank in answering) is (frame.kind is _ACK):
            raise ProtocolError(f"an {frame.kind.name}; the ranks that answer are {', '.join(map(str, answering))}")
        if rank not in pending.awaited or not pending.answer(rank, value):
            return False
        del self._pending[frame.seq]
        self._uncounted.append((pending.asked_ns, pending.published_ns, frame.received_ns, frame.busy_us, time.monotonic_ns()))
        return True

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
