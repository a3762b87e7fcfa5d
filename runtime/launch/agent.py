"""The supervisor of one node's ranks, forked by its guard (``guard.py``), with its driver on standard input and output.

    driver ==records==> agent, child subreaper, in a session with its guard
                          ├─ zygote          only while ranks are being forked
                          ├─ rank 0          own session, dies with the agent
                          ├─ rank 1 ── child of it
                          └─ orphan of a rank, adopted

It ends when its ranks have ended, when it is told to, when its guard is gone, or its driver: the stream ended, or the driver's pidfd
fired, which a fork of the driver that still holds the stream cannot hide. Whatever the reason, it leaves no process: it kills its
ranks' groups, then every child that it has or adopts until it has none, removes the run directory, and reports ``AgentGone`` last.

The loop's thread starts every process, since a parent-death signal is bound to the thread that forked. The file passes 350 lines
because all that ends a rank is in it: what one part left, another would have to know of.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import sys
from pathlib import Path

from ...errors import BadFrameError, LaunchError
from ...process import become_subreaper, child_pids, end_child, has_children, name_process
from .agent_protocol import (
    AgentGone,
    AgentRecord,
    AgentStarted,
    AgentWarning,
    DriverLost,
    DumpStacks,
    GuardGone,
    Hold,
    LaunchFailed,
    RankExited,
    RankLog,
    RankStack,
    RankStart,
    RankStarted,
    Release,
    Signal,
    StacksDone,
    Start,
    Stop,
)
from .nodes.node_duties import NodeDuties, with_own_environment
from .rank_process import RankProcess
from .rank_starting import Zygote, spawn_rank
from .record_stream import RecordStream
from .resources import launch_error
from .run_directory import RunDirectory, remove_dead_directories

_MAX_PENDING_LOG_BYTES = 8 << 20
_PACE_PERIOD_S = 0.02
_SWEEP_PERIOD_S = 0.005
_FLUSH_S = 2.0
_DEFAULT_KILL_S = 2.0
_MIN_REAP_S = 2.0  # for what is killed at once, too


class Agent:
    """Starts the ranks that its driver orders, reports what becomes of them, and ends them."""

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        driver_pidfd: int,
        guard_pidfd: int,
        handover: socket.socket,
        giver: socket.socket | None = None,
    ) -> None:
        self._stream = RecordStream(read_fd, write_fd, self._on_record, self._on_end)
        self._driver_pidfd = driver_pidfd
        self._guard_pidfd = guard_pidfd
        self._handover = handover
        self._duties = NodeDuties(self._stream.send, giver, self._lose_driver)
        self._is_driver_gone = False
        self._is_mute = False  # the cause is told, and what follows from it is no news
        self._change = asyncio.Event()
        self._order: Start | None = None
        self._ranks: dict[int, RankProcess] = {}
        self._zygote: Zygote | None = None
        self._log_dir: str | None = None
        self._kill_s = _DEFAULT_KILL_S
        # When the ranks get SIGTERM and SIGKILL, on the loop's clock.
        self._term_at = math.inf
        self._kill_at = math.inf
        self._is_terminated = False
        self._num_lines_dropped = 0
        self._is_held = False
        self._pacing: asyncio.TimerHandle | None = None
        self._dumps: set[asyncio.Task[None]] = set()
        self._dumping = asyncio.Lock()

    async def run(self) -> None:
        """Serve until nothing is left to supervise."""
        loop = asyncio.get_running_loop()
        become_subreaper()
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop, 0.0, _DEFAULT_KILL_S)
        loop.add_signal_handler(signal.SIGQUIT, self._stop, 0.0, 0.0)
        loop.add_signal_handler(signal.SIGCHLD, self._reap_orphans)
        loop.add_reader(self._driver_pidfd, self._on_driver_end)
        loop.add_reader(self._guard_pidfd, self._on_guard_end)
        self._stream.open()
        self._stream.send(AgentStarted(os.getpid()))
        try:
            await self._supervise()
        finally:
            left = await self._end_all()
            await self._duties.aclose()
            self._remove_run_directory()
            if not self._is_mute:
                self._tell_dropped()
                self._stream.send(AgentGone(tuple(sorted(left))))
            await self._flush()
            with contextlib.suppress(ProcessLookupError):  # gone and reaped
                signal.pidfd_send_signal(self._guard_pidfd, signal.SIGCONT)  # a stopped one would outlive all the others
            self._stream.close()

    async def _flush(self) -> None:
        """Wait until the driver has taken everything: over a slow link that takes long, and what it does not get is lost."""
        idle_s = 0.0
        while (pending := self._stream.pending_bytes) and not self._is_driver_gone and idle_s <= self._duties.patience_s:
            if not await self._stream.wait_flushed(_FLUSH_S):
                idle_s = 0.0 if self._stream.pending_bytes < pending else idle_s + _FLUSH_S

    async def _supervise(self) -> None:
        loop = asyncio.get_running_loop()
        starting: asyncio.Task[None] | None = None
        try:
            while True:
                now = loop.time()
                if now >= self._term_at:
                    self._kill_at += now - self._term_at  # a pause of this process takes nothing from the time after SIGTERM
                    self._term_at, self._is_terminated = math.inf, True
                    self._signal_groups(signal.SIGTERM, signal.SIGCONT)
                if now >= self._kill_at:
                    return
                is_stopping = self._kill_at < math.inf
                if self._order is not None and starting is None:
                    starting = loop.create_task(self._start_ranks(self._order))
                    starting.add_done_callback(lambda task: self._change.set())
                is_started = starting is not None and starting.done()
                if starting is not None and starting.done():
                    starting.result()
                if (is_stopping and not is_started) or (is_started and not self._running()):
                    return
                await self._wait_change(min(self._term_at, self._kill_at))
        finally:
            if starting is not None:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)

    async def _wait_change(self, until: float) -> None:
        timeout_s = None if until == math.inf else max(0.0, until - asyncio.get_running_loop().time())
        try:
            await asyncio.wait_for(self._change.wait(), timeout_s)
        except asyncio.TimeoutError:
            return
        self._change.clear()

    # --- starting ---

    async def _start_ranks(self, order: Start) -> None:
        try:
            self._log_dir = order.log_dir
            self._make_log_dir(order)
            self._duties.starting(order)
            if order.start_method == "fork":
                self._zygote = Zygote(order)
                await self._zygote.open()
            for rank in order.ranks:
                await self._start_rank(order, rank)
            if self._zygote is not None:  # nothing is started later, and one process fewer can fail
                self._zygote.kill()
                self._zygote = None
        except (LaunchError, OSError) as error:
            reason = launch_error("a rank cannot be started", error) if isinstance(error, OSError) else error
            self._stream.send(LaunchFailed(str(reason)))
            self._kill_at = 0.0

    async def _start_rank(self, order: Start, start: RankStart) -> None:
        rank, write_fds = self._open_rank(order, start)
        try:
            if self._zygote is not None:
                pid = await self._zygote.fork_rank(start, *write_fds)
            else:
                pid = spawn_rank(order, start, *write_fds)
        finally:
            for fd in write_fds:
                os.close(fd)
        self._stream.send(RankStarted(start.rank, pid))
        rank.watch(pid)

    def _open_rank(self, order: Start, start: RankStart) -> tuple[RankProcess, tuple[int, int, int]]:
        error_file = start.environment.get("TORCHELASTIC_ERROR_FILE")
        rank = self._ranks[start.rank] = RankProcess(start.rank, self._log_dir, self._report, self._change.set, error_file)
        try:
            return rank, rank.open()
        except OSError as error:
            self._leave_logs(order, error)
        return self._open_rank(order, start)

    def _make_log_dir(self, order: Start) -> None:
        try:
            if self._log_dir is not None:
                Path(self._log_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._leave_logs(order, error)

    def _leave_logs(self, order: Start, error: OSError) -> None:
        """Go on without log files on another node, whose homes and disks need not be the driver's; on that, raise the error."""
        if self._log_dir is None or error.filename is None or not order.has_own_environment:
            raise error
        self._log_dir = None
        self._stream.send(AgentWarning(f"no log files are kept on {os.uname().nodename}: {error}; --log-dir says where they can be"))

    # --- what arrives ---

    def _on_record(self, record: AgentRecord) -> None:
        self._duties.heard()
        if isinstance(record, Start) and self._order is None:
            self._order = with_own_environment(record)
            self._kill_s = record.kill_s
        elif isinstance(record, Stop):
            self._stop(record.grace_s, record.kill_s)
        elif isinstance(record, Signal):
            for rank in self._running():
                (rank.signal if record.number == signal.SIGTERM else rank.signal_group)(record.number)
        elif isinstance(record, (Hold, Release)):
            self._is_held = isinstance(record, Hold)
            self._pace()
        elif isinstance(record, DumpStacks):
            dump = asyncio.get_running_loop().create_task(self._dump_stacks(record.request))
            self._dumps.add(dump)
            dump.add_done_callback(self._dumps.discard)
        elif not self._duties.take(record):
            self._stream.send(AgentWarning(f"the order {type(record).__name__} was not expected and is ignored"))
        self._change.set()

    def _lose_driver(self, reason: str) -> None:
        self._stream.send(DriverLost(reason))
        self._is_mute = True
        self._on_end(None)
        print(f"zspmd agent: {reason}", file=sys.stderr)  # last: whoever reads it may be gone

    def _on_driver_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._driver_pidfd)
        self._on_end(None)

    def _on_guard_end(self) -> None:
        """Say so at once, since what carries the stream may end with the guard; end everything, and report none of that."""
        asyncio.get_running_loop().remove_reader(self._guard_pidfd)
        self._stream.send(GuardGone())
        self._is_mute = True
        self._kill_at = 0.0
        self._change.set()

    def _on_end(self, error: BadFrameError | None) -> None:
        self._is_driver_gone = True
        self._kill_at = 0.0
        self._change.set()
        if error is not None:
            print(f"zspmd agent: the driver broke the protocol: {error}", file=sys.stderr)  # last, as above

    def _stop(self, grace_s: float, kill_s: float) -> None:
        now = asyncio.get_running_loop().time()
        if not self._is_terminated:
            self._term_at = min(self._term_at, now + grace_s)
        self._kill_at = min(self._kill_at, now + grace_s + kill_s)
        self._kill_s = max(kill_s, _MIN_REAP_S)
        self._change.set()

    # --- what is reported ---

    def _report(self, record: RankLog | RankExited | AgentWarning) -> None:
        """Send a record; log lines only while the driver keeps up, or ranks are made to wait for it."""
        if self._is_mute:
            return
        if isinstance(record, RankLog):
            if self._is_behind() and self._order is not None and self._order.log_policy == "wait":
                self._pace()
            elif self._is_behind() or (self._num_lines_dropped and self._stream.pending_bytes > _MAX_PENDING_LOG_BYTES // 2):
                self._num_lines_dropped += len(record.lines)
                return
            self._tell_dropped()
        self._stream.send(record)

    def _tell_dropped(self) -> None:
        """Say how many lines the driver did not get; once in half a buffer, or that would be what fills it."""
        if self._num_lines_dropped:
            where = "; log files are complete" if self._log_dir is not None else ""
            text = f"{self._num_lines_dropped} log lines from {os.uname().nodename} are not shown, since they were read too slowly{where}"
            self._num_lines_dropped = 0
            self._stream.send(AgentWarning(text))

    def _is_behind(self) -> bool:
        return self._stream.pending_bytes > _MAX_PENDING_LOG_BYTES

    def _pace(self) -> None:
        """Let ranks wait while the driver asks for it or does not read, and look again."""
        for rank in self._ranks.values():
            rank.set_reading(not self._is_held and not self._is_behind())
        if self._pacing is not None:
            self._pacing.cancel()
        self._pacing = asyncio.get_running_loop().call_later(_PACE_PERIOD_S, self._pace) if self._is_behind() else None

    async def _dump_stacks(self, request: int) -> None:
        async def tell(rank: RankProcess) -> None:
            self._stream.send(RankStack(request, rank.rank, await rank.take_stacks()))

        async with self._dumping:  # one at a time empties and reads a rank's file
            await asyncio.gather(*map(tell, self._running()))
        self._stream.send(StacksDone(request))

    # --- ending ---

    def _running(self) -> list[RankProcess]:
        return [rank for rank in self._ranks.values() if rank.is_running]

    def _signal_groups(self, *numbers: int) -> None:
        for rank in self._running():
            for number in numbers:
                rank.signal_group(number)

    def _reap_orphans(self) -> None:
        """Reap adopted children that have ended, unless a rank may be among them whose pid the zygote has yet to tell."""
        if self._zygote is None:
            for pid in self._orphans():
                os.waitpid(pid, os.WNOHANG)

    def _orphans(self) -> set[int]:
        known = {rank.pid for rank in self._running()}
        if self._zygote is not None:
            known.add(self._zygote.pid)
        return child_pids() - known

    def _kill_orphans(self) -> None:
        for pid in self._orphans():
            end_child(pid)

    def _remove_run_directory(self) -> None:
        """Remove it; when the driver is gone, also one that it had no time to hand over."""
        try:
            directory = RunDirectory.handed_over(self._handover)
            if directory is not None:
                directory.remove()
            if self._is_driver_gone:
                remove_dead_directories()
        except OSError as error:
            self._stream.send(AgentWarning(f"the run directory could not be removed: {error}"))

    async def _end_all(self) -> set[int]:
        """Kill and reap every child, own or adopted; return those that did not end in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._kill_s
        self._signal_groups(signal.SIGKILL)
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote = None
        while has_children() and loop.time() < deadline:
            self._kill_orphans()
            await asyncio.sleep(_SWEEP_PERIOD_S)
        for rank in self._ranks.values():
            rank.close()
        return child_pids()


def serve(driver_pidfd: int, guard_pidfd: int, handover: socket.socket, giver: socket.socket | None = None) -> None:
    """Run the agent on standard input and output, until it has nothing left to supervise or either of the two processes ends.

    ``handover`` is the packet socket in which ``RunDirectory.hand_over`` leaves the directory of the launch, ``giver`` its other end
    where the agent makes the directory.
    """
    name_process("zspmd-agent")
    # The channel moves away from 0 and 1, so that nothing that prints can write into it.
    read_fd, write_fd = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)

    async def run() -> None:
        await Agent(read_fd, write_fd, driver_pidfd=driver_pidfd, guard_pidfd=guard_pidfd, handover=handover, giver=giver).run()

    asyncio.run(run())
