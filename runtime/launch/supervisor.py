"""The driver's handle on the agent of one node."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from ...errors import BadFrameError, LaunchError, describe_exit
from ...transport.schema import pack_record
from .agent_protocol import (
    AgentGone,
    AgentRecord,
    AgentWarning,
    Hold,
    LaunchFailed,
    RankExited,
    RankLog,
    RankStarted,
    Release,
    Signal,
    Start,
    Stop,
)
from .record_stream import RecordStream
from .run_directory import RunDirectory

# Beyond the moments that an order names: for the agent to reap, to report and to end.
_MARGIN_S = 3.0


@dataclass(frozen=True)
class AgentLost:
    """The agent ended without saying that it was done; the kernel has killed its ranks. ``reason`` says how it ended."""

    reason: str


Event = RankStarted | RankLog | RankExited | AgentWarning | LaunchFailed | AgentGone | AgentLost


class NodeSupervisor:
    """Starts the ranks of this node under an agent and follows them to the end.

    Events come in order, on the loop that called ``start``: ``RankStarted`` for each rank, ``RankLog`` as it prints, ``RankExited``
    once for each, and last ``AgentGone`` or ``AgentLost``. ``on_event`` must not raise; if it does, the loop's exception handler
    is told and the rest goes on.

    The agent has its own session, so that a terminal's Ctrl-C reaches the driver alone. It ends with this process, however that
    ends, and takes everything that ranks have started with it.
    """

    def __init__(self, start: Start, on_event: Callable[[Event], None], *, run_directory: RunDirectory | None = None) -> None:
        self._order = start
        self._on_event = on_event
        self._run_directory = run_directory
        self._agent: subprocess.Popen[bytes] | None = None
        self._agent_pidfd = -1
        self._stream: RecordStream | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[None] | None = None
        self._reaped = asyncio.Event()
        self._is_done = False
        self._pids: dict[int, int] = {}
        self._exit_codes: dict[int, int] = {}

    @property
    def pids(self) -> dict[int, int]:
        """The pid of each rank that was started."""
        return dict(self._pids)

    @property
    def exit_codes(self) -> dict[int, int]:
        """The exit code of each rank that has ended, negative for a signal."""
        return dict(self._exit_codes)

    @property
    def agent_pid(self) -> int | None:
        return None if self._agent is None else self._agent.pid

    async def start(self, timeout_s: float = 120.0) -> None:
        """Start the agent and its ranks; return when each rank has a process.

        Raises:
            LaunchError: a rank could not be started, within ``timeout_s`` or at all; nothing is left running.

        Cancellation: everything that was started is being killed; ``stop`` waits for the end of that.
        """
        assert self._agent is None, "start is called once"
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        try:
            self._execute_agent()
            await asyncio.wait_for(self._started, timeout_s)
        except asyncio.TimeoutError:
            await self.stop(0.0, self._order.kill_s)
            missing = sorted({rank.rank for rank in self._order.ranks} - set(self._pids))
            raise LaunchError(f"ranks {missing} had no process after {timeout_s} s") from None
        except LaunchError:
            await self.stop(0.0, self._order.kill_s)
            raise
        except BaseException:
            self.kill_nowait()
            raise

    async def stop(self, grace_s: float, kill_s: float) -> dict[int, int]:
        """End every rank and the agent, and return the exit codes by rank.

        Ranks get ``grace_s`` seconds to end by themselves, then SIGTERM, and SIGKILL ``kill_s`` later; with them go all processes
        that they started. Call it again, also while it runs, to make it quicker. A rank whose end nobody saw is not in the result.
        """
        if self._agent is None or self._stream is None:
            return {}
        self.stop_nowait(grace_s, kill_s)
        if not await self._wait_reaped(grace_s + 2 * kill_s + _MARGIN_S):
            self._signal_agent(signal.SIGKILL)
            if not await self._wait_reaped(_MARGIN_S):
                raise LaunchError(f"the agent, pid {self._agent.pid}, did not end {_MARGIN_S} s after SIGKILL; see its state in /proc")
        return self.exit_codes

    def stop_nowait(self, grace_s: float, kill_s: float) -> None:
        """Ask for the same without waiting for it."""
        if self._stream is not None:
            self._stream.send(Stop(grace_s, kill_s))

    def signal_nowait(self, number: int) -> None:
        """Have a signal sent to every rank that runs, as ``Signal`` says."""
        if self._stream is not None:
            self._stream.send(Signal(int(number)))

    def hold_nowait(self, is_held: bool) -> None:
        """Have what ranks print left in their pipes, so that they wait, or read again."""
        if self._stream is not None:
            self._stream.send(Hold() if is_held else Release())

    def kill_nowait(self) -> None:
        """End everything at once without waiting: the agent finds its driver gone and kills all that it has. Safe to call again."""
        if self._agent is None or self._stream is None or self._reaped.is_set():
            return
        self._stream.close()
        self._is_done = True
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_later(self._order.kill_s + _MARGIN_S, self._signal_agent, signal.SIGKILL)

    def _execute_agent(self) -> None:
        directory = self._run_directory
        order = replace(self._order, driver_pid=os.getpid())
        if directory is not None:
            order = replace(order, run_directory=str(directory.path), lock_fd=directory.lock_fd)
        try:
            pack_record(order)
        except BadFrameError as error:
            raise LaunchError(f"the agent cannot be told what to start: {error}; give fewer ranks, arguments or variables") from error
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                self._agent = subprocess.Popen(
                    [sys.executable, "-m", "zspmd.runtime.launch.agent"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    start_new_session=True,
                    # Not the caller's directory: a file there must not be taken for a module of the same name.
                    cwd="/",
                    pass_fds=() if directory is None else (directory.lock_fd,),
                )
            except OSError as error:
                raise LaunchError(f"the agent of this node cannot be started: {error}") from error
            self._agent_pidfd = os.pidfd_open(self._agent.pid)
            fd = ours.detach()
        self._stream = RecordStream(fd, fd, self._on_record, self._on_end)
        self._stream.open()
        asyncio.get_running_loop().add_reader(self._agent_pidfd, self._on_agent_exit)
        self._stream.send(order)

    async def _wait_reaped(self, timeout_s: float) -> bool:
        try:
            await asyncio.wait_for(self._reaped.wait(), timeout_s)
        except asyncio.TimeoutError:
            return False
        return True

    def _signal_agent(self, number: int) -> None:
        if self._agent is not None and not self._reaped.is_set():
            signal.pidfd_send_signal(self._agent_pidfd, number)

    def _on_record(self, record: AgentRecord) -> None:
        if isinstance(record, RankStarted):
            self._pids[record.rank] = record.pid
            self._emit(record)
            if len(self._pids) == len(self._order.ranks):
                self._settle_start(None)
        elif isinstance(record, RankExited):
            self._exit_codes[record.rank] = record.exit_code
            self._emit(record)
        elif isinstance(record, LaunchFailed):
            self._emit(record)
            self._settle_start(LaunchError(record.reason))
        elif isinstance(record, AgentGone):
            self._is_done = True
            self._emit(record)
        elif isinstance(record, (RankLog, AgentWarning)):
            self._emit(record)
        else:
            self._on_end(BadFrameError(f"the agent sent the order {type(record).__name__}"))

    def _on_end(self, error: BadFrameError | None) -> None:
        """An agent that closes its stream has said all, or is beyond help."""
        if error is not None:
            self._emit(AgentWarning(f"the agent is killed, since it broke the protocol: {error}"))
        if not self._is_done:
            self._signal_agent(signal.SIGKILL)

    def _on_agent_exit(self) -> None:
        assert self._agent is not None, "the agent was started"
        assert self._stream is not None, "and its stream was made"
        asyncio.get_running_loop().remove_reader(self._agent_pidfd)
        code = self._agent.wait()
        self._stream.drain()
        self._stream.close()
        self._reaped.set()
        os.close(self._agent_pidfd)
        text = f"the agent of this node, pid {self._agent.pid}, {describe_exit(code)}"
        self._settle_start(LaunchError(text))
        if not self._is_done:
            self._is_done = True
            self._emit(AgentLost(text))

    def _settle_start(self, error: LaunchError | None) -> None:
        if self._started is None or self._started.done():
            return
        if error is None:
            self._started.set_result(None)
        else:
            self._started.set_exception(error)

    def _emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except Exception as error:  # the caller's code: it must not end the supervision
            asyncio.get_running_loop().call_exception_handler({"message": f"on_event raised on {type(event).__name__}", "exception": error})
