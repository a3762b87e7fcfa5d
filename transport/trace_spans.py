"""What ``ctx.trace`` and ``group.trace`` are: spans and marks of a program's own on the timeline, or nothing where no trace is made."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from typing import Protocol

from .trace_buffer import TraceBuffer, TraceKind, record_head

_MAX_THREADS = 255
_clock = time.monotonic_ns


class Trace(Protocol):
    """Where a program says what it does, for the timeline of ``launch(trace=FILE)``.

    Attributes:
        is_on: whether a trace is made; what is costly to say may depend on it.
    """

    is_on: bool

    def span(self, name: str) -> AbstractContextManager[None]:
        """Return what shows its ``with`` block as a span of this name, in the thread and the step in which it begins.

        Names are kept in a table of 64 KiB: use few, without numbers in them. Costs about 0.9 us, and 0.15 us where no trace is made.
        """

    def mark(self, name: str) -> None:
        """Show this moment."""


class NoTrace:
    """A ``Trace`` of nothing."""

    is_on = False

    def span(self, name: str) -> AbstractContextManager[None]:
        """Return a context manager that does nothing, always the same."""
        return _NO_SPAN

    def mark(self, name: str) -> None:
        """Do nothing."""


class _NoSpan:
    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


_NO_SPAN = _NoSpan()
NO_TRACE = NoTrace()


class Span:
    """The span of a ``with`` block; ``SpanTrace.span`` hands it out, to the main thread the same one again and again."""

    __slots__ = ("_begin", "_end", "_head", "_number", "_trace", "is_entered")

    def __init__(self, trace: SpanTrace, head: int) -> None:
        self._trace = trace
        self._begin = trace.begin
        self._end = trace.end
        self._head = head
        self.is_entered = False

    def __enter__(self) -> None:
        self.is_entered = True
        self._number = self._begin(self._head, self._trace.seq, 0)

    def __exit__(self, *error: object) -> None:
        self._end(self._number)
        self.is_entered = False


class SpanTrace:
    """A ``Trace`` that writes into a buffer.

    Attributes:
        seq: the frame that is being done, to which spans belong; -1 for none.
        begin, end: as ``TraceBuffer.writers`` gives them.
        threads: number by identity, 0 for the thread that made this.
    """

    is_on = True

    def __init__(self, buffer: TraceBuffer) -> None:
        self.buffer = buffer
        self.seq = -1
        self.begin, self.end = buffer.writers()
        self._main = threading.get_ident()
        self.threads = {self._main: 0}
        self._heads: dict[str, int] = {}
        self._spans: dict[str, Span] = {}

    def span(self, name: str) -> Span:
        """Return a span of this name."""
        if threading.get_ident() == self._main:
            span = self._spans.get(name)
            if span is not None and not span.is_entered:
                return span
        return self._new_span(name)

    def _new_span(self, name: str) -> Span:
        """Return one that nobody else has: the first of its name, one inside another of its name, or another thread's."""
        thread = self.threads.get(threading.get_ident())
        if thread is None:
            thread = self.new_thread()
        head = self._heads.get(name)
        if head is None:
            head = self._heads[name] = record_head(TraceKind.SPAN, self.buffer.name_number(name))
        span = Span(self, head | thread << 8)
        if not thread:
            self._spans.setdefault(name, span)
        return span

    def collective_head(self, operation: str, axis: str) -> int:
        """Return what is the same in all records of an operation."""
        return record_head(TraceKind.COLLECTIVE, self.buffer.name_number(operation), self.buffer.name_number(axis))

    def mark(self, name: str) -> None:
        """Show this moment."""
        thread = self.threads.get(threading.get_ident())
        if thread is None:
            thread = self.new_thread()
        self.buffer.add(record_head(TraceKind.MARK, self.buffer.name_number(name)) | thread << 8, self.seq, _clock())

    def new_thread(self) -> int:
        """Number the calling thread, and tell its name."""
        thread = self.threads[threading.get_ident()] = min(len(self.threads), _MAX_THREADS)
        name = self.buffer.name_number(threading.current_thread().name)
        self.buffer.add(record_head(TraceKind.THREAD, name) | thread << 8, -1, _clock())
        return thread
