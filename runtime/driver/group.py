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
    ConfigError,
    InternalError,
    ProtocolError,
    WorkerError,
    WorkerStalledError,
    ZspmdError,
)
from ...transport.frames import ResultFrame, ResultKind, StepKind
from ...transport.records import Failure
from .alarm import Alarm
from .events import EventLog, GroupEvent
from .faults import FaultLog
from .launching import GroupConfig, check_ranks
from .overdue import OverdueReplies
from .pending import PendingReply
from .processes import GroupProcesses
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
            on_subscribed=self._publish_sync,
            on_result=self._on_result,
            on_exit=lambda rank, exit_code: self._verdict.exited(rank, exit_code),
            on_error=lambda error: self._verdict.troubled(error),
            on_broken=lambda error: self._verdict.unreadable(error),
        )
        self._reports = self._processes.reports
        self._verdict = Verdict(
            config.launch_id, self._fault_log(), lambda rank: self._reports.not_ended(rank, config.deadlines.drain_s), self._fail
        )
        self._overdue = OverdueReplies(self._processes.dump_stacks, self._reports, self._give_up)
        self._stream = StepStream(
            self._processes, window=config.window, num_ranks=self.world_size, on_overdue=self._overdue.add, call_error=self._call_error
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
        self._num_steps = 0
        self._is_started = False
        self._is_ready = False
        self._fault: ZspmdError | None = None
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
    def fault(self) -> ZspmdError | None:
        """What the group failed with, or None; every use of it raises that."""
        return self._fault

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

        Cancellation: whatever was started is ended first.
        """
        if self._is_started or self._events.is_closed:
            raise ClosedError(f"group {self.launch_id} was started or closed before; launch a new one")
        self._is_started = True
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ready.add_done_callback(_see)  # what start raises may be another error
        self._stream.open(self._loop)
        self._verdict.open(self._loop)
        try:
            await self._start_processes()
        except BaseException:
            self._is_fault_told = True
            await self.aclose(abort=True)
            raise
        self._is_ready = True
        self._watch.start(self._loop)
        self._events.emit("ready", detail=f"{self.world_size} ranks")

    async def _start_processes(self) -> None:
        """Wait for processes and set-up together: a rank may fail while others are still being started, and is then the cause."""
        alarm = Alarm(self._loop, self.config.deadlines.ready_s, self._on_ready_timeout)
        starting = self._loop.create_task(self._processes.start())
        try:
            await asyncio.wait([starting, self._ready], return_when=asyncio.FIRST_COMPLETED)
            if self._ready.done():
                self._ready.result()
            await asyncio.wait([starting])  # all may be ready before the agent has told that it started them: cancelled, it would end them
            if self._fault is not None:
                raise self._fault
            await starting
            await self._ready
        finally:
            alarm.cancel()
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)

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
        return await (await self.submit(inputs, timeout_s=timeout_s))

    async def submit(self, inputs: Any, *, timeout_s: float | None = None) -> PendingReply:
        """Publish one step as soon as the window has room, and return at once; await the result for the answers.

        Arrays of 256 KiB and more are sent from where they lie, and the answer then waits until every rank has done with them: leave them
        unchanged until it is there, or after an error until the group is closed. Smaller ones are the caller's at once.

        Raises:
            BackpressureError: no room within ``deadlines.step_s``; names the ranks that are behind. Nothing was sent.
            Otherwise as ``step``, whose ``timeout_s`` this is.
        """
        limit = self._limit(timeout_s)
        await self._wait_for_room()
        pending = self._stream.ask(StepKind.STEP, inputs, self._num_steps, self.config.output_ranks, limit)
        self._num_steps += 1
        self._stream.statistics.steps += 1
        return pending

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
        await self._wait_for_room()
        pending = self._stream.ask(StepKind.CALL, [method, list(args), kwargs, list(asked)], None, asked, limit)
        self._stream.statistics.calls += 1
        return await pending

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
        return await self._overdue.dump_stacks(self._limit(timeout_s))

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
        if not self._ready.done():
            self._ready.set_exception(self._fault or closed)
        try:
            last_fault = await self._end_ranks(is_graceful=self._is_ready and not abort)
        except BaseException:  # a second Ctrl-C cancels this task too, and the program may go on
            self._processes.kill_nowait()
            raise
        finally:
            self._verdict.stopping()
            self._watch.close()
            self._stream.fail(self._fault or closed)
            self._stream.close()
            await self._overdue.aclose()
            self._processes.close()
            self._events.emit("closed")
        self._fault = self._fault or last_fault
        is_told = self._is_fault_told or any(pending.has_raised for pending in self._failed)
        if self._fault is not None and not abort and not is_told:
            raise self._fault

    async def _end_ranks(self, *, is_graceful: bool) -> ZspmdError | None:
        """End the ranks, after their steps and by STOP if that is graceful; returns what went wrong with them then."""
        drain_s = self.config.deadlines.drain_s
        if is_graceful and self._fault is None:
            await self._stream.drain(drain_s)
        if not is_graceful or self._fault is not None:
            self._verdict.stopping()
            await self._processes.stop(grace_s=0.0)
            return None
        self._stop_ranks()
        self._verdict.stopping(signals_after_s=drain_s)
        await self._processes.stop(grace_s=drain_s)
        fault = await self._verdict.last_words()
        if fault is not None and self.config.recorder is not None:
            self.config.recorder.failed(fault)
        return fault

    def _stop_ranks(self) -> None:
        with contextlib.suppress(BackpressureError):  # a rank that does not read is ended by signals
            self._stream.publish(StepKind.STOP)

    # publishing

    async def _wait_for_room(self) -> None:
        self._check_open()
        await self._stream.wait_for_room(self.config.deadlines.step_s)
        self._check_open()

    def _limit(self, timeout_s: float | None) -> float:
        limit = self.config.deadlines.step_s if timeout_s is None else timeout_s
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise ConfigError(f"timeout_s is {limit!r}; it must be a number of seconds above 0")
        return limit

    def _publish_sync(self) -> None:
        """Every rank has subscribed: ask for the round trip that proves both directions, once each has set up."""
        self._stream.publish(StepKind.SYNC)

    # collecting

    def _on_result(self, frame: ResultFrame) -> None:
        try:
            self._take(frame)
        except (AnswerLostError, BackpressureError, InternalError, ProtocolError) as error:
            self._verdict.misanswered(frame.rank, frame.seq, error)

    def _take(self, frame: ResultFrame) -> None:
        if frame.rank >= self.world_size:
            raise ProtocolError(f"{frame.kind.name} of rank {frame.rank}; the ranks are 0 to {self.world_size - 1}")
        if frame.kind is ResultKind.ERROR:
            self._verdict.raised(frame.rank, read_failure(frame))
            return
        self._stream.take(frame)
        if frame.kind is ResultKind.SYNC_ACK and not self._stream.in_flight and not self._ready.done():
            self._ready.set_result(None)

    # failing

    def _fail(self, error: ZspmdError) -> None:
        """Raise ``error`` from every await, now and later, and end the ranks."""
        self._fault = error
        if self.config.recorder is not None:
            self.config.recorder.failed(error)
        self._events.emit("failed", error.rank if isinstance(error, WorkerError) else None, str(error))
        self._is_fault_told = self._stream.has_waiters
        self._failed = self._stream.pending
        self._processes.kill_nowait()
        self._stream.fail(error)
        if not self._ready.done():
            self._ready.set_exception(error)

    def _on_ready_timeout(self) -> None:
        if not self._ready.done():
            has_synced = self._stream.in_flight > 0  # before that, some have not subscribed
            self._ready.set_exception(self._processes.not_ready(self._stream.missing(0) if has_synced else None))

    def _give_up(self, pending: PendingReply, error: WorkerStalledError) -> None:
        self._events.emit("stalled", error.rank, str(error.args[0]))
        self._stream.give_up(pending, error)

    def _call_error(self, rank: int, failure: Failure) -> WorkerError:
        log = self._fault_log()
        log.raised(rank, failure)
        return log.first_cause()

    def _fault_log(self) -> FaultLog:
        return FaultLog(self._reports.identity, self._processes.log_tail)

    def _check_started(self) -> None:
        if not self._processes.is_open:
            raise ClosedError(f"group {self.launch_id} has not been started, or could not be; enter it with 'async with'")

    def _check_open(self) -> None:
        self._check_started()
        if self._fault is not None:
            self._is_fault_told = True
            raise self._fault.with_traceback(None)
        if asyncio.get_running_loop() is not self._loop:
            raise ClosedError(f"group {self.launch_id} belongs to another event loop; use it where it was started")
        if self._close_task is not None or not self._is_ready:
            raise ClosedError(f"group {self.launch_id} is {'closed' if self._close_task else 'not ready'}; launch a new one")


def _see(ready: asyncio.Future[None]) -> None:
    """Mark an exception as seen, so that asyncio doesn't complain of one that nobody awaits."""
    if not ready.cancelled():
        ready.exception()
