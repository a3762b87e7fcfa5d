"""Tracing a group: what the driver writes down of its steps, where its ranks do, and how both become one timeline.

    driver   TracedStepStream ─> TraceBuffer ────────────────────────────────────┐
    rank     FrameTrace, spans ─> TraceBuffer in memory that both have mapped ───┼─ LaunchTimeline ─> TraceFile
    rank of another node ─> TraceBuffer there ─ TraceEvents, twice a second ─────┘

While steps run, a trace costs what its records cost; the timeline is made when the ranks have ended, however they have.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...config import TraceConfig
from ...errors import ProtocolError
from ...transport.frames import ResultFrame, ResultKind, StepKind
from ...transport.records import TraceEvents
from ...transport.trace_buffer import TraceBuffer, TraceKind, TraceRecords, record_head
from ...transport.trace_handover import take_over
from ...transport.trace_spans import SpanTrace
from ..launch.plan import LaunchPlan
from ..launch.resources import launch_error
from .events import GroupEvent
from .pending import PendingReply
from .step_stream import StepStream
from .trace_events import LaunchTimeline, TracedLaunch, TracedProcess, next_first_row, row_of
from .trace_file import TraceFile

_ANSWERED = record_head(TraceKind.ANSWERED)
_clock = time.monotonic_ns
Clock = Callable[[int], tuple[int, float]]


class TracedStepStream(StepStream):
    """A step stream that writes down when each step was asked, encoded, published and answered."""

    def trace_into(self, buffer: TraceBuffer) -> None:
        """Say where; before the stream is used."""
        self._buffer = buffer
        self._add = buffer.add

    def ask(self, kind: StepKind, value: Any, ranks: Sequence[int], timeout_s: float) -> PendingReply:
        """As ``StepStream.ask``."""
        pending = super().ask(kind, value, ranks, timeout_s)
        if kind is StepKind.STEP:
            head = record_head(TraceKind.ASKED_STEP, 0, pending.step_id or 0)
        else:
            head = record_head(TraceKind.ASKED_CALL, self._buffer.name_number(value[0]))
        self._add(head, pending.seq, pending.asked_ns, pending.published_ns, _clock())
        return pending

    def take(self, frame: ResultFrame) -> bool:
        """As ``StepStream.take``."""
        begun_ns = _clock()
        has_woken = super().take(frame)
        if frame.kind is not ResultKind.GAP:
            self._add(_ANSWERED | frame.rank << 32, frame.seq, begun_ns, _clock())
        return has_woken


class GroupTracer:
    """Makes the trace of a group, and of those that replace it under an engine, in one file."""

    def __init__(self, config: TraceConfig, path: str) -> None:
        self._config = config
        self._file = TraceFile(path)
        self._base_ns = _clock()
        self.trace = SpanTrace(TraceBuffer.in_memory(config.capacity))
        """Where the driver's program writes spans of its own."""
        self._num_taken = 0  # of the driver's records: those of earlier launches are in the file
        self._num_launches = 0
        self._last: TracedLaunch | None = None
        self._buffers: list[TraceBuffer] = []
        self._fds: dict[int, int] = {}  # by rank: of the memory that it shares

    def step_stream(self, *args: Any, **options: Any) -> StepStream:
        """Return a ``StepStream`` that is traced."""
        stream = TracedStepStream(*args, **options)
        stream.trace_into(self.trace.buffer)
        return stream

    def starting(self, plan: LaunchPlan) -> None:
        """Make the file, and the memory for each rank's records: where it runs on this node such that it shares.

        Raises:
            ConfigError: the file cannot be made.
            ResourceError: no room for the memory.
        """
        self._file.create()
        self._plan = plan
        try:
            self._buffers = [self._make_buffer(rank, is_shared=plan.node_of(rank).is_local) for rank in range(plan.world_size)]
        except OSError as error:
            self._close_fds()
            raise launch_error(f"there is no memory for the trace of {plan.world_size} ranks", error) from error

    def _make_buffer(self, rank: int, *, is_shared: bool) -> TraceBuffer:
        if not is_shared:
            return TraceBuffer.in_memory(self._config.capacity)
        self._fds[rank] = os.memfd_create("zspmd-trace", os.MFD_CLOEXEC)
        return TraceBuffer.in_file(self._fds[rank], self._config.capacity)

    def _close_fds(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def place_of(self, rank: int) -> tuple[int, str]:
        """Return how many events a rank is to keep, and the file in memory for them; "" where it cannot reach one."""
        fd = self._fds.get(rank)
        return self._config.capacity, "" if fd is None else f"/proc/{os.getpid()}/fd/{fd}"

    def told(self, rank: int, events: TraceEvents) -> None:
        """Take what a rank of another node says.

        Raises:
            BadFrameError: it makes no sense.
            ProtocolError: the rank shares its memory, and has nothing to say.
        """
        if rank in self._fds:
            raise ProtocolError(f"rank {rank} sent TraceEvents, although it shares its trace with the driver")
        take_over(self._buffers[rank], events)

    def finish(self, pids: Sequence[int | None], events: Sequence[GroupEvent], clock: Clock) -> None:
        """Write the timeline of the launch, which has ended or could not be started; what was not started is not in it.

        Args:
            pids: of the ranks, by rank.
            clock: returns for a node by how many nanoseconds its clock is ahead, and how far that may be off, in seconds.
        """
        self._num_launches += 1
        driver = self._read_driver()
        ranks = [self._read_rank(rank, pids[rank], clock) for rank in range(len(self._buffers))]
        self._buffers = []
        self._close_fds()
        launch = TracedLaunch(self._num_launches, next_first_row(self._last), driver, ranks, events)
        timeline = LaunchTimeline(launch, self._base_ns)
        self._file.append(timeline.events(), self._facts(launch, timeline.ranks))
        self._last = launch

    def _read_driver(self) -> TracedProcess:
        records = self.trace.buffer.read()
        taken, self._num_taken = self._num_taken, records.first + len(records.table)
        num_dropped = max(0, records.first - taken)
        rest = records._replace(table=records.table[max(0, taken - records.first) :], is_closed=True)
        return TracedProcess(-1, "driver", os.getpid(), rest, num_dropped)

    def _read_rank(self, rank: int, pid: int | None, clock: Clock) -> TracedProcess:
        records = self._buffers[rank].read()
        nodes, node_rank = self._plan.nodes, self._plan.ranks[rank].node_rank
        name = f"rank {rank} ({nodes[node_rank].name})" + (f", launch {self._num_launches}" if self._num_launches > 1 else "")
        offset_ns, error_s = (0, 0.0) if nodes[node_rank].is_local else clock(node_rank)
        return TracedProcess(rank, name, pid, records, records.first, offset_ns, error_s)

    def _facts(self, launch: TracedLaunch, ranks: Sequence[TracedProcess]) -> dict[str, Any]:
        return {
            "launch_id": self._plan.launch_id,
            "max_events": self._config.capacity,
            "processes": [_facts(launch, process) for process in (launch.driver, *ranks)],
        }


def _facts(launch: TracedLaunch, process: TracedProcess) -> dict[str, Any]:
    records: TraceRecords = process.records
    is_known = process.error_s < float("inf")
    return {
        "name": process.name,
        "row": row_of(launch, process),
        "pid": process.pid,
        "events_kept": len(records.table),
        "events_dropped": process.num_dropped,
        "names_dropped": records.num_unnamed,
        "is_complete": records.is_closed,
        "clock_offset_us": process.offset_ns / 1000,
        "clock_error_us": round(process.error_s * 1e6, 3) if is_known else None,
    }
