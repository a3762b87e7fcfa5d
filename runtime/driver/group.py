"""The worker group: the ranks of one launch, seen from the driver.

    new -> starting -> ready -> closing -> closed
               \\________\\_________/
                 a fault: every await raises the first cause, the ranks are ended

Each step is encoded once and published once. Answers are counted down in the reader's callback, so a step costs one object and one
wake-up however many ranks there are.

The file passes 350 lines because the docstrings of the public methods are the contract of this package.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ...errors import (
    BackpressureError,
    ClosedError,
    ConfigError,
    InternalError,
    PeerLostError,
    ProtocolError,
    WorkerError,
    ZspmdError,
)
from ...transport.codec import ValueEncoder, decode_value
from ...transport.frames import ResultFrame, ResultKind, StepKind
from ...transport.records import Failure, unpack_record
from ...transport.window import CreditWindow
from .faults import SETTLE_S, FaultLog
from .gate import WindowGate
from .launching import GroupConfig, check_ranks
from .pending import PendingReply
from .processes import GroupProcesses
from .statistics import GroupStatistics, RankHealth


class WorkerGroup:
    """Publishes steps and calls to supervised ranks and collects what they answer; ``zspmd.launch`` makes one.

    Enter it with ``async with``; everything it started is gone when that ends, however it ends. All methods belong to the event
    loop that entered it.
    """

    def __init__(self, config: GroupConfig) -> None:
        self.config = config
        self._encoder = ValueEncoder()
        self._processes = GroupProcesses(
            config,
            on_subscribed=self._publish_sync,
            on_result=self._on_result,
            on_exit=self._on_exit,
            on_error=self._on_error,
            on_broken=self._on_broken,
        )
        self._reports = self._processes.reports
        self._faults = FaultLog(self._reports.identity, self._processes.log_tail)
        self._statistics = GroupStatistics()
        self._window = CreditWindow(size=config.window, num_ranks=self.world_size)
        self._pending: dict[int, PendingReply] = {}
        self._gate = WindowGate(self._window)
        self._num_steps = 0
        self._is_started = False
        self._is_ready = False
        self._is_closing = False
        self._signals_from = 0.0  # while closing: the supervisor sends none before
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
            ClosedError: it was started before, or is being closed by another task.

        Cancellation: whatever was started is ended first.
        """
        if self._is_started:
            raise ClosedError(f"group {self.launch_id} was started before; launch a new one")
        self._is_started = True
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._ready.add_done_callback(_see)  # what start raises may be another error
        try:
            await self._start_processes()
        except BaseException:
            self._is_fault_told = True
            await self.aclose(abort=True)
            raise
        self._is_ready = True

    async def _start_processes(self) -> None:
        """Wait for processes and set-up together: a rank may fail while others are still being started, and is then the cause."""
        timeout = self._loop.call_later(self.config.deadlines.ready_s, self._on_ready_timeout)
        starting = self._loop.create_task(self._processes.start())
        try:
            await asyncio.wait([starting, self._ready], return_when=asyncio.FIRST_COMPLETED)
            if not self._ready.done():
                await starting
            await self._ready
        finally:
            timeout.cancel()
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

        Arrays above 256 KiB are sent from where they lie: leave them unchanged until the answer is there.

        Raises:
            BackpressureError: no room within ``deadlines.step_s``; names the ranks that are behind. Nothing was sent.
            Otherwise as ``step``, whose ``timeout_s`` this is.
        """
        limit = self._limit(timeout_s)
        await self._wait_for_room()
        pending = self._publish(StepKind.STEP, inputs, self._num_steps, self.config.output_ranks, limit)
        self._num_steps += 1
        self._statistics.steps += 1
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
        pending = self._publish(StepKind.CALL, [method, list(args), kwargs, list(asked)], None, asked, limit)
        self._statistics.calls += 1
        return await pending

    def health(self) -> list[RankHealth]:
        """Return what each rank last said of itself; asks nobody."""
        self._check_started()
        return self._reports.health()

    def statistics(self) -> GroupStatistics:
        """Return the group's counters and histograms; the object goes on counting."""
        self._check_started()
        self._statistics.in_flight = self._window.in_flight
        self._statistics.sent_bytes = self._processes.publisher.sent_bytes
        self._statistics.foreign_frames = self._processes.collector.dropped_foreign
        return self._statistics

    async def aclose(self, *, abort: bool = False) -> None:
        """End the ranks and remove everything the launch made; may be called again.

        Steps in flight are waited for up to ``deadlines.drain_s``, or not at all with ``abort``; then ranks are ended by STOP,
        SIGTERM and SIGKILL in turn.

        Raises:
            WorkerError: a rank failed while it was closing, or before and nobody has been told.

        Cancellation: closing goes on; whoever awaits it again finds it further on.
        """
        if not self._is_started:
            return
        if asyncio.get_running_loop() is not self._loop:
            self._processes.kill_nowait()
            raise ClosedError(f"group {self.launch_id} belongs to another event loop; its ranks are killed: close it where it was started")
        if self._close_task is None:
            self._close_task = self._loop.create_task(self._close(abort))
        await asyncio.shield(self._close_task)

    async def _close(self, abort: bool) -> None:
        drain_s = self.config.deadlines.drain_s
        closed = ClosedError(f"group {self.launch_id} is closed; launch a new one")
        if not self._ready.done():
            self._ready.set_exception(self._fault or closed)
        graceful = self._is_ready and not abort and self._fault is None
        try:
            if graceful:
                await self._drain(drain_s)
            self._is_closing = True
            if graceful and self._fault is None:
                self._stop_ranks()
                self._signals_from = time.monotonic() + drain_s
            await self._processes.stop(grace_s=drain_s if graceful and self._fault is None else 0.0)
        finally:
            self._is_closing = True
            self._fail_pending(self._fault or closed)
            self._processes.close()
        if graceful and self._fault is None and self._faults:
            self._fault = self._faults.first_cause()
        is_told = self._is_fault_told or any(pending.has_raised for pending in self._failed)
        if self._fault is not None and not abort and not is_told:
            raise self._fault

    async def _drain(self, drain_s: float) -> None:
        """Wait for what is in flight, up to ``drain_s``; whoever awaits it gets the outcome, so it is of no interest here."""
        if self._pending:
            await asyncio.wait([pending.wait_done() for pending in self._pending.values()], timeout=drain_s)

    def _stop_ranks(self) -> None:
        with contextlib.suppress(BackpressureError):  # a rank that does not read is ended by signals
            self._window.opened(self._processes.publish(StepKind.STOP))

    # publishing

    async def _wait_for_room(self) -> None:
        self._check_open()
        await self._gate.wait(self.config.deadlines.step_s)
        self._check_open()

    def _limit(self, timeout_s: float | None) -> float:
        limit = self.config.deadlines.step_s if timeout_s is None else timeout_s
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit > 0:
            raise ConfigError(f"timeout_s is {limit!r}; it must be a number of seconds above 0")
        return limit

    def _publish(self, kind: StepKind, value: Any, step_id: int | None, ranks: Sequence[int], limit: float) -> PendingReply:
        try:
            seq = self._processes.publish(kind, *self._encoder.encode(value))
        except BaseException:
            self._gate.grant()  # the room that this caller waited for is the next one's
            raise
        self._window.opened(seq)
        pending = PendingReply(self._loop, seq, step_id, ranks, published_at=time.monotonic())
        pending.expire_after(limit, self._overdue)
        self._pending[seq] = pending
        return pending

    def _publish_sync(self) -> None:
        """Every rank has subscribed: ask for the round trip that proves both directions, once each has set up."""
        self._window.opened(self._processes.publish(StepKind.SYNC))

    # collecting

    def _on_result(self, frame: ResultFrame) -> None:
        """Take one answer. A rank that breaks the protocol ends the group: what it has done is not known any more."""
        try:
            self._take(frame)
        except (ProtocolError, InternalError) as error:
            broken = ProtocolError(f"rank {frame.rank} answered frame {frame.seq} with what it must not: {error}")
            broken.__cause__ = error
            self._fail(broken)

    def _take(self, frame: ResultFrame) -> None:
        kind = frame.kind
        if kind is ResultKind.ERROR:
            self._faults.raised(frame.rank, _failure(frame))
            self._settle()
            return
        if self._window.acknowledged(frame.rank, frame.seq):
            self._gate.grant()
        if kind is ResultKind.OUTPUT or kind is ResultKind.REPLY:
            self._answer(frame, decode_value(frame.body, frame.buffers))
        elif kind is ResultKind.CALL_ERROR:
            pending = self._pending.pop(frame.seq, None)
            if pending is None or pending.is_done:
                self._statistics.late_answers += 1
            else:
                pending.fail(self._call_error(frame.rank, _failure(frame)))
        elif kind is ResultKind.SYNC_ACK and not self._window.in_flight and not self._ready.done():
            self._ready.set_result(None)

    def _answer(self, frame: ResultFrame, value: Any) -> None:
        pending = self._pending.get(frame.seq)
        if pending is None or pending.is_done:
            self._statistics.late_answers += 1
            self._pending.pop(frame.seq, None)
        elif pending.answer(frame.rank, value):
            del self._pending[frame.seq]
            self._statistics.round_trip.record(time.monotonic() - pending.published_at)
            self._statistics.busy.record(frame.busy_us / 1e6)

    # failing

    def _on_exit(self, rank: int, exit_code: int) -> None:
        was_ours = exit_code in (-signal.SIGTERM, -signal.SIGKILL) and time.monotonic() >= self._signals_from
        if self._is_closing and was_ours:
            self._faults.failed(self._reports.not_ended(rank, self.config.deadlines.drain_s))
        elif not self._is_closing or exit_code != 0:
            self._faults.exited(rank, exit_code)
            self._settle()

    def _on_error(self, error: Exception) -> None:
        """A socket or the agent failed in a way that is no rank's doing, or a peer broke the protocol."""
        if isinstance(error, PeerLostError):
            self._fail(error)
        else:
            print(f"zspmd: {self.launch_id}: {type(error).__name__}: {error}", file=sys.stderr)

    def _on_broken(self, error: Exception) -> None:
        """An answer could not be read: its acknowledgement is lost with it, so nothing that follows can be trusted."""
        broken = ProtocolError(f"a rank's answer could not be read: {error}")
        broken.__cause__ = error
        self._fail(broken)

    def _settle(self) -> None:
        """Collect what else is heard for a moment, then name the first cause."""
        if self._fault is None and not self._is_closing:
            self._loop.call_later(SETTLE_S, self._conclude)

    def _conclude(self) -> None:
        if self._fault is None:
            self._fail(self._faults.first_cause())

    def _fail(self, error: ZspmdError) -> None:
        """Raise ``error`` from every await, now and later, and end the ranks."""
        if self._fault is not None or self._is_closing:
            return
        self._fault = error
        self._is_fault_told = self._gate.has_waiters
        self._failed = list(self._pending.values())
        self._processes.kill_nowait()
        self._fail_pending(error)
        if not self._ready.done():
            self._ready.set_exception(error)

    def _fail_pending(self, error: ZspmdError) -> None:
        for pending in self._pending.values():
            pending.fail(error)
        self._pending.clear()
        self._gate.fail(error)

    def _on_ready_timeout(self) -> None:
        if not self._ready.done():
            has_synced = self._window.in_flight > 0  # before that, some have not subscribed
            self._ready.set_exception(self._processes.not_ready(self._window.missing(0) if has_synced else None))

    def _overdue(self, pending: PendingReply) -> WorkerError:
        return self._reports.overdue(pending, self._window.missing(pending.seq) or pending.missing)

    def _call_error(self, rank: int, failure: Failure) -> WorkerError:
        log = FaultLog(self._reports.identity, self._processes.log_tail)
        log.raised(rank, failure)
        return log.first_cause()

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


def _failure(frame: ResultFrame) -> Failure:
    record = unpack_record(frame.body)
    if not isinstance(record, Failure):
        raise InternalError(f"rank {frame.rank} sent a {type(record).__name__} as the reason of a failure")
    return record
