"""The worker group: the ranks of one launch, seen from the driver.

    new -> starting -> ready -> closing -> closed
               \\________\\_________/
                 a fault: every await raises the first cause, the ranks are ended

``StepStream`` has the frames on their way, ``GroupProcesses`` the processes and sockets, ``Verdict`` decides which failure came first;
the group holds them together. The file passes 350 lines because its public docstrings are the contract of this package.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any

from ...errors import (
    AnswerLostError,
    BackpressureError,
    ClosedError,
    InternalError,
    ProtocolError,
    ReadyTimeoutError,
    TopologyError,
    WorkerError,
    WorkerStalledError,
    ZspmdError,
)
from ...transport.frames import ResultFrame, ResultKind, StepKind
from ...transport.records import Failure
from ...transport.trace_spans import Trace
from ..launch.plan import LaunchPlan
from .events import EventLog, GroupEvent
from .faults import FaultLog
from .launching import GroupConfig, check_ranks
from .overdue import OverdueReplies
from .pending import PendingReply
from .processes import GroupProcesses
from .readiness import Readiness
from .reply_deadlines import check_limit
from .statistics import GroupStatistics, RankHealth
from .step_stream import StepStream, read_failure
from .verdict import Verdict
from .watch import RankWatch


class WorkerGroup:
    """Publishes steps and calls to supervised ranks and collects what they answer; ``zspmd.launch`` makes one.

    Enter it with ``async with``; everything it started is gone when that ends, however it ends. All methods belong to the event
    loop that entered it.
    """

    def __init__(self, config: GroupConfig) -> None:
        self.config = config
        self._events = EventLog()
        self._processes = GroupProcesses(
            config,
            self._events,
            on_subscribed=lambda: self._stream.publish(StepKind.SYNC),  # the round trip that proves both directions
            on_result=self._on_result,
            on_exit=lambda rank, exit_code, at_s: self._verdict.exited(rank, exit_code, at_s),
            on_error=lambda error: self._verdict.troubled(error),
            on_broken=lambda error: self._verdict.unreadable(error),
        )
        self._reports = self._processes.reports
        self._verdict = Verdict(
            config.launch_id, self._fault_log(), lambda rank: self._reports.not_ended(rank, config.deadlines.drain_s), self._fail
        )
        self._overdue = OverdueReplies(self._processes.dump_stacks, self._reports, self._give_up)
        self._stream = (StepStream if config.tracer is None else config.tracer.step_stream)(
            self._processes,
            window=config.window,
            num_ranks=self.world_size,
            output_ranks=config.output_ranks,
            on_overdue=self._overdue.add,
            call_error=self._call_error,
        )
        self._reports.step_of = self._stream.step_of
        self._watch = RankWatch(
            lambda: self._processes.control.ranks,
            self._stream.window,
            beat_s=config.deadlines.beat_s,
            on_silent=lambda rank, unheard_s: self._events.emit("silent", rank, f"no beat for {unheard_s:.1f} s"),
            on_heard=lambda rank: self._events.emit("heard", rank),
            on_lost=self._verdict.answer_lost,
        )
        self._readiness = Readiness(self._not_ready, lambda: self.fault)
        self._is_started = False
        self._is_ready = False
        self._is_fault_told = False
        self._failed: list[PendingReply] = []  # by the fault
        self._close_task: asyncio.Task[None] | None = None

    @property
    def launch_id(self) -> str:
        return self.config.launch_id

    @property
    def world_size(self) -> int:
        return self.config.parallel.world_size

    @property
    def plan(self) -> LaunchPlan:
        """Where each rank runs; from the start on."""
        self._check_started()
        return self._processes.plan

    @property
    def fault(self) -> ZspmdError | None:
        """What the group failed with, or None; every use of it raises that."""
        return self._verdict.fault

    @property
    def trace(self) -> Trace:
        """``with group.trace.span("name"):`` shows what the driver's program does, without an await in it, on the launch's timeline."""
        return self.config.trace

    async def __aenter__(self) -> WorkerGroup:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            await self.aclose(abort=error is not None)
        except ZspmdError as fault:
            if error is None:
                raise
            if fault is not error:  # the body's error goes on; a second one must not hide it
                print(f"zspmd: while closing {self.launch_id}: {fault}", file=sys.stderr)

    async def start(self) -> None:
        """Start the ranks and wait until each has set up and answered a SYNC; ``async with`` calls it.

        Raises:
            EndpointInUseError: another live launch has this launch id.
            ReadyTimeoutError: ranks in ``missing`` were not ready within ``deadlines.ready_s``.
            WorkerError: a rank failed before it was ready.
            TypeError, ValueError: something in ``worker_args`` may not travel; names its path. Nothing was started.
            ClosedError: it was started or closed before, or is being closed by another task.
            SystemExit: this is a rank of an external launch other than 0, and the launch has ended; ``launch`` says more.
            PeerLostError: likewise, and the driver is lost.

        Cancellation: whatever was started is ended first.
        """
        if self._is_started or self._events.is_closed:
            raise ClosedError(f"group {self.launch_id} was started or closed before; launch a new one")
        self._is_started = True
        place = self.config.dial
        if place is not None and not place.is_driver:
            from .external_launch import serve_driver

            raise SystemExit(await serve_driver(place, self.config.deadlines.ready_s))
        self._loop = asyncio.get_running_loop()
        self._readiness.open(self._loop)
        self._stream.open(self._loop)
        self._verdict.open(self._loop)
        try:
            await self._readiness.wait(self._processes.start(), self.config.deadlines.ready_s)
        except BaseException:
            self._is_fault_told = True
            await self.aclose(abort=True)
            raise
        self._is_ready = True
        self._watch.start(self._loop)
        self._events.emit("ready", detail=f"{self.world_size} ranks")

    async def step(self, inputs: Any, *, timeout_s: float | None = None) -> list[Any]:
        """Publish one step and return what the output ranks answer, in the order of ``output_ranks``.

        Args:
            inputs: any value that may travel; every rank's ``Worker.step`` gets it.
            timeout_s: seconds from publication to the last answer; ``deadlines.step_s`` if None.

        Raises:
            TypeError, ValueError: something in ``inputs`` may not travel; names its path. Nothing was sent.
            WorkerStalledError: no answer in time; ``missing`` names the ranks. The group lives on.
            WorkerError: a rank failed; the group is at its end.
            ClosedError: the group is closed.

        Cancellation: before the publication nothing happened; after it the step still completes on the ranks.
        """
        limit = self._limit(timeout_s)
        if not self._may_ask():
            await self._wait_for_room()
        return await self._stream.ask(StepKind.STEP, inputs, self.config.output_ranks, limit)

    async def submit(self, inputs: Any, *, ranks: Sequence[int] | None = None, timeout_s: float | None = None) -> PendingReply:
        """Publish one step as soon as the window has room, and return at once; await the result for the answers.

        With ``ranks``, some of the output ranks, it waits for the answers of these alone; what the others answer is dropped.

        Arrays of 256 KiB and more are sent from where they lie, and the answer then waits until every rank has done with them: leave them
        unchanged until it is there, or after an error until the group is closed. Smaller ones are the caller's at once.

        Raises:
            BackpressureError: no room within ``deadlines.step_s``; names the ranks that are behind. Nothing was sent.
            TopologyError: no rank, one twice, or one that is no output rank.
            Otherwise as ``step``, whose ``timeout_s`` this is.
        """
        limit = self._limit(timeout_s)
        asked = self.config.output_ranks if ranks is None else self._check_output_ranks(ranks)
        if not self._may_ask():
            await self._wait_for_room()
        return self._stream.ask(StepKind.STEP, inputs, asked, limit)

    async def call(
        self, method: str, /, *args: Any, ranks: Sequence[int] | None = None, timeout_s: float | None = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method that the worker marks ``@zspmd.rpc``, in order with the steps; returns the answers of ``ranks``.

        Args:
            args, kwargs: of the method, which cannot have keyword arguments named ``ranks`` or ``timeout_s``.
            ranks: who calls it and answers; every rank if None.
            timeout_s: as in ``step``.

        Raises:
            WorkerRaisedError: it raised on a rank; the group lives on.
            TopologyError: a rank outside the world.
            Otherwise as ``step``.
        """
        if not isinstance(method, str):
            raise TypeError(f"method is {method!r}; give the name of one that the worker marks @zspmd.rpc")
        limit = self._limit(timeout_s)
        asked = check_ranks("ranks", "all" if ranks is None else ranks, self.world_size)
        if not self._may_ask():
            await self._wait_for_room()
        return await self._stream.ask(StepKind.CALL, [method, list(args), kwargs, list(asked)], asked, limit)

    def health(self) -> list[RankHealth]:
        """Return what each rank last said of itself; asks nobody."""
        self._check_started()
        return self._reports.health()

    def statistics(self) -> GroupStatistics:
        """Return the group's counters and histograms; the object goes on counting."""
        self._check_started()
        statistics = self._stream.statistics
        statistics.in_flight = self._stream.in_flight
        statistics.sent_bytes = self._processes.publisher.sent_bytes
        statistics.replayed_frames = self._processes.publisher.replayed
        statistics.foreign_frames = self._processes.collector.dropped_foreign
        statistics.impostor_frames = self._processes.impostor_frames
        return statistics

    async def dump_stacks(self, *, timeout_s: float = 2.0) -> dict[int, str]:
        """Return by rank what each process is doing: a line with the kernel's word, then the Python stacks of its threads.

        Ranks are asked by a signal that they need not have the interpreter for; they go on as if nothing were. One that is stopped,
        or does not answer within ``timeout_s``, has the first line only, with the reason.

        Raises:
            ClosedError: the group has not been started, or is closed.
        """
        self._check_started()
        if self._close_task is not None:
            raise ClosedError(f"group {self.launch_id} is closed: its ranks do nothing any more")
        return await self._overdue.dump_stacks(check_limit(timeout_s))

    def events(self) -> AsyncIterator[GroupEvent]:
        """Return a stream of what happens to the group: from the first event on, however late it is asked for, to ``closed``.

        Any number of streams may be read at once, before the start and after the end too. The last 1,000 events are kept.
        """
        return self._events.stream()

    async def aclose(self, *, abort: bool = False) -> None:
        """End the ranks and remove everything the launch made; may be called again.

        Steps in flight are waited for up to ``deadlines.drain_s``, or not at all with ``abort``; then ranks are ended by STOP,
        SIGTERM and SIGKILL in turn.

        Raises:
            WorkerError: a rank failed while it was closing, or before and nobody has been told.
            PeerLostError: what supervises the ranks was killed meanwhile, and they with it.

        Cancellation: closing goes on; whoever awaits it again finds it further on.
        """
        if not self._is_started:
            if not self._events.is_closed:
                self._events.emit("closed")
            return
        if asyncio.get_running_loop() is not self._loop:
            raise self._kill_from_elsewhere()
        if self._close_task is None:
            self._close_task = self._loop.create_task(self._close(abort))
        await asyncio.shield(self._close_task)

    def _kill_from_elsewhere(self) -> ClosedError:
        reason = f"group {self.launch_id} belongs to another event loop; its ranks are killed: close it where it was started"
        if self._loop.is_running():  # in another thread
            self._loop.call_soon_threadsafe(self._verdict.fail, ClosedError(reason))
        else:
            self._processes.kill_nowait()
        return ClosedError(reason)

    async def _close(self, abort: bool) -> None:
        self._events.emit("closing")
        closed = ClosedError(f"group {self.launch_id} is closed; launch a new one")
        self._readiness.fail(self.fault or closed)
        try:
            last_fault = await self._end_ranks(is_graceful=self._is_ready and not abort)
        except BaseException:  # a second Ctrl-C cancels this task too, and the program may go on
            self._processes.kill_nowait()
            raise
        finally:
            self._verdict.stopping()
            self._watch.close()
            self._stream.fail(self.fault or closed)
            self._stream.close()
            await self._overdue.aclose()
            await self._processes.leave_callers(int(abort or self.fault is not None))  # what they end with
            self._processes.close()
            self._events.emit("closed")
        if self.fault is None:
            self._verdict.fault = last_fault
        is_told = self._is_fault_told or any(pending.has_raised for pending in self._failed)
        if self.fault is not None and not abort and not is_told:
            raise self.fault

    async def _end_ranks(self, *, is_graceful: bool) -> ZspmdError | None:
        """End the ranks, after their steps and by STOP if that is graceful; returns what went wrong with them then."""
        drain_s = self.config.deadlines.drain_s
        if is_graceful and self.fault is None:
            await self._stream.drain(drain_s)
        if not is_graceful or self.fault is not None:
            self._verdict.stopping()
            await self._processes.stop(grace_s=0.0)
            return None
        with contextlib.suppress(BackpressureError):  # a rank that does not read is ended by signals
            self._stream.publish(StepKind.STOP)
        self._verdict.stopping(signals_after_s=drain_s)
        await self._processes.stop(grace_s=drain_s)
        fault = await self._verdict.last_words()
        if fault is not None and self.config.recorder is not None:
            self.config.recorder.failed(fault)
        return fault

    def _check_output_ranks(self, ranks: Sequence[int]) -> Sequence[int]:
        asked = check_ranks("ranks", ranks, self.world_size)
        for rank in asked:
            if rank not in self.config.output_ranks:
                raise TopologyError(f"ranks has {rank!r}, which does not answer steps; the output ranks are {self.config.output_ranks}")
        return asked

    def _may_ask(self) -> bool:
        """Whether ``_wait_for_room`` would return at once."""
        is_open = self._is_ready and self._close_task is None and self._verdict.fault is None
        return is_open and asyncio.get_running_loop() is self._loop and self._stream.gate.is_open

    async def _wait_for_room(self) -> None:
        self._check_open()
        await self._stream.gate.wait(self.config.deadlines.step_s)
        self._check_open()

    def _limit(self, timeout_s: float | None) -> float:
        return self.config.deadlines.step_s if timeout_s is None else check_limit(timeout_s)

    def _on_result(self, frame: ResultFrame) -> bool:
        """Take one answer; returns whether it woke whoever awaits a step or call."""
        try:
            if frame.kind is ResultKind.ERROR:
                self._verdict.raised(self._stream.known_rank(frame), read_failure(frame))
                return False
            if self._stream.take(frame):
                return True
        except (AnswerLostError, BackpressureError, InternalError, ProtocolError) as error:
            self._verdict.misanswered(frame.rank, frame.seq, error)
            return False
        if frame.kind is ResultKind.SYNC_ACK and not self._stream.in_flight:
            self._readiness.reach()
        return False

    def _fail(self, error: ZspmdError) -> None:
        """Raise ``error`` from every await, now and later, and end the ranks."""
        if self.config.recorder is not None:
            self.config.recorder.failed(error)
        self._events.emit("failed", error.rank if isinstance(error, WorkerError) else None, str(error))
        if self.config.dial is not None:  # another launcher may end this process before it comes to say it
            print(f"zspmd: {self.launch_id}: {error}", file=sys.stderr, flush=True)
        self._is_fault_told = self._stream.gate.has_waiters
        self._failed = self._stream.pending
        self._processes.kill_nowait()
        self._stream.fail(error)
        self._readiness.fail(error)

    def _not_ready(self) -> ReadyTimeoutError:
        has_synced = self._stream.in_flight > 0  # before that, some have not subscribed
        return self._processes.not_ready(self._stream.missing(0) if has_synced else None)

    def _give_up(self, pending: PendingReply, error: WorkerStalledError) -> None:
        self._events.emit("stalled", error.rank, str(error.args[0]))
        self._stream.give_up(pending, error)

    def _fault_log(self) -> FaultLog:
        return FaultLog(self._reports.identity, self._processes.log_tail)

    def _call_error(self, rank: int, failure: Failure) -> WorkerError:
        log = self._fault_log()
        log.raised(rank, failure)
        return log.first_cause()

    def _check_started(self) -> None:
        if not self._processes.is_open:
            raise ClosedError(f"group {self.launch_id} has not been started, or could not be; enter it with 'async with'")

    def _check_open(self) -> None:
        self._check_started()
        if self.fault is not None:
            self._is_fault_told = True
            raise self.fault.with_traceback(None)
        if asyncio.get_running_loop() is not self._loop:
            raise ClosedError(f"group {self.launch_id} belongs to another event loop; use it where it was started")
        if self._close_task is not None or not self._is_ready:
            raise ClosedError(f"group {self.launch_id} is {'closed' if self._close_task else 'not ready'}; launch a new one")
