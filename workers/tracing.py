"""A rank's side of a trace: its buffer, the spans of steps and collectives, and how all that comes to the driver."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ConfigError, PeerLostError
from ..transport.control_sockets import ControlClient
from ..transport.frames import Buffer, ResultKind, StepFrame, StepKind
from ..transport.records import Hello, Welcome
from ..transport.trace_buffer import TraceBuffer, TraceKind
from ..transport.trace_handover import HANDOVER_S, TraceSender
from ..transport.trace_spans import SpanTrace
from .loop import AnswerSink, FrameSource

if TYPE_CHECKING:
    from .communicators.communicator import Communicator
    from .mesh import Mesh

_LAST_WORD_S = 2.0
_ANSWERS = (ResultKind.OUTPUT, ResultKind.ACK, ResultKind.REPLY, ResultKind.CALL_ERROR)
_KINDS = {StepKind.STEP: TraceKind.STEP, StepKind.CALL: TraceKind.CALL}
_clock = time.monotonic_ns


class FrameTrace:
    """A ``FrameSource`` and ``AnswerSink`` that write down when each frame came and was answered, around the rank's own.

    One record a step: since when the rank waited for it, when it had it, when the answer was ready, and when that was sent.
    """

    def __init__(self, trace: SpanTrace, frames: FrameSource, answers: AnswerSink) -> None:
        self.rank = answers.rank
        self._trace = trace
        self._frames = frames
        self._answers = answers
        self._waiting_since = 0
        self._num_steps = 0
        self._number = 0

    def receive(self, timeout_ms: int) -> StepFrame | None:
        """Return the next frame; None when ``timeout_ms`` passed without one."""
        if not self._waiting_since:
            self._waiting_since = _clock()
        frame = self._frames.receive(timeout_ms)
        if frame is None:
            return None
        trace, kind = self._trace, _KINDS.get(frame.kind)
        if kind is None:
            trace.seq = -1
            return frame
        head = kind | (self._num_steps & 0xFFFF_FFFF) << 32
        self._num_steps += kind is TraceKind.STEP
        trace.seq = frame.seq
        self._number = trace.begin(head, frame.seq, self._waiting_since)
        return frame

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
        """Pass one answer on."""
        done_ns = _clock()
        self._answers.push(kind, seq, body, buffers, busy_us=busy_us, received_ns=received_ns)
        if kind in _ANSWERS:
            self._waiting_since = _clock()
            self._trace.buffer.fill(self._number, done_ns, self._waiting_since)


class TraceHandover:
    """A thread that tells the driver what is new in the buffer, twice a second and once more at the end."""

    def __init__(self, buffer: TraceBuffer, connect: Callable[[], ControlClient], hello: Hello) -> None:
        self._sender = TraceSender(buffer)
        self._connect = connect
        self._hello = hello
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="zspmd-trace", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Tell the rest; returns when the driver has it, or after ``_LAST_WORD_S``."""
        self._stopped.set()
        self._thread.join(2 * _LAST_WORD_S)

    def _run(self) -> None:
        client = self._connect()
        try:
            client.send(self._hello)
            while not self._stopped.wait(HANDOVER_S):
                self._tell(client, is_last=False)
            self._tell(client, is_last=True)
            client.receive(_LAST_WORD_S)
        except PeerLostError:
            pass  # the driver does not read any more; the file says that the end of this rank is missing
        finally:
            client.close()

    def _tell(self, client: ControlClient, *, is_last: bool) -> None:
        for events in self._sender.take(is_last=is_last):
            client.send(events)


@contextmanager
def open_trace(welcome: Welcome, connect: Callable[[], ControlClient], hello: Hello) -> Iterator[SpanTrace]:
    """Yield the trace of this rank, which is marked as complete at the end of the block, and told where the driver cannot read it.

    Raises:
        ConfigError: the driver's file in memory cannot be opened.
    """
    if not welcome.trace_path:
        buffer = TraceBuffer.in_memory(welcome.trace_events)
        handover = TraceHandover(buffer, connect, hello)
        try:
            yield SpanTrace(buffer)
        finally:
            handover.stop()
        return
    try:
        buffer = TraceBuffer.open(welcome.trace_path)
    except OSError as error:
        raise ConfigError(
            f"this rank cannot open its trace in the driver's memory: {error}; leave trace out, or run both as one user"
        ) from error
    yield SpanTrace(buffer)
    buffer.close()


def trace_collectives(mesh: Mesh, trace: SpanTrace) -> None:
    """Have what the mesh's communicators do shown as spans."""
    mesh.on_created = functools.partial(_trace, trace)


def _trace(trace: SpanTrace, axis: str, communicator: Communicator) -> None:
    from .communicators.traced import trace_communicator  # which needs torch, as its first use does

    if communicator.size > 1:
        trace_communicator(communicator, axis, trace)
