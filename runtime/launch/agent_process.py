"""The processes that a driver starts on its own node: the guard, which is its child, and the agent below it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from ...errors import BadFrameError, LaunchError, describe_exit
from .agent_protocol import AgentRecord, AgentStarted, GuardGone
from .guard import KILL_AGENT
from .record_stream import RecordStream
from .resources import launch_error
from .run_directory import RunDirectory

# For an agent that was killed to leave, and for its guard to clean up after it.
_KILLED_S = 3.0


class AgentProcess:
    """An agent with its guard, from their start until both have ended.

    Calls back ``on_record`` for each record; ``on_silence`` once when the agent says no more, with the error where it broke the
    protocol; ``on_end`` once, with the way in words, when the guard has ended. The agent may then be there still: it finds its
    guard gone, and ends too.

    Guard and agent have a session of their own, so that a terminal's Ctrl-C reaches the driver alone.
    """

    def __init__(
        self,
        on_record: Callable[[AgentRecord], None],
        on_silence: Callable[[BadFrameError | None], None],
        on_end: Callable[[str], None],
    ) -> None:
        self._on_record = on_record
        self._on_silence = on_silence
        self._on_end = on_end
        self._ended = asyncio.Event()
        self._is_silent = False
        self._is_guard_reaped = False
        self._is_guard_gone = False
        self.agent_pid: int | None = None

    def open(self) -> None:
        """Start both and return at once; they need some tenths of a second until they serve.

        Raises:
            LaunchError: no process can be started; nothing is left.
            ResourceError: since descriptors, processes or memory have run out.
        """
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            try:
                stream, theirs = map(stack.enter_context, socket.socketpair())
                self._handover, their_handover = map(stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                self._guard = _execute_guard(theirs.fileno(), their_handover.fileno())
                stack.callback(self._guard.wait)
                stack.callback(self._guard.kill)  # it was told nothing yet
                self._guard_pidfd = os.pidfd_open(self._guard.pid)
            except OSError as error:
                raise launch_error("the agent of this node cannot be started", error) from error
            stack.pop_all()
            theirs.close()
            their_handover.close()
        fd = stream.detach()
        self._stream = RecordStream(fd, fd, self._handle, self._on_stream_end)
        self._stream.open()
        self._loop.add_reader(self._guard_pidfd, self._on_guard_end)

    @property
    def guard_pid(self) -> int:
        return self._guard.pid

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def send(self, record: AgentRecord) -> None:
        """Queue a record for the agent; it is dropped when the agent is gone."""
        self._stream.send(record)

    def hand_over(self, directory: RunDirectory) -> None:
        """Have agent and guard hold the lock of a run directory too, and remove it at their end.

        Raises:
            LaunchError: they are gone.
        """
        try:
            directory.hand_over(self._handover)
        except OSError as error:
            raise launch_error("the agent cannot be given the run directory", error) from error
        finally:
            self._handover.close()

    def disconnect(self, kill_s: float) -> None:
        """Have the agent find its driver gone, and both killed ``kill_s`` seconds later if they are there still."""
        self._stream.close()
        self._is_silent = True
        self._check_ended()
        if not self._loop.is_closed():
            self._loop.call_later(kill_s, self.kill_agent)
            self._loop.call_later(kill_s + _KILLED_S, self.kill_both)

    async def wait_ended(self, timeout_s: float) -> None:
        """Wait until both have ended; kill the agent after ``timeout_s``, and later the guard with it.

        Raises:
            LaunchError: even that has not ended them.
        """
        for escalate, limit_s in ((None, timeout_s), (self.kill_agent, _KILLED_S), (self.kill_both, _KILLED_S)):
            if escalate is not None:
                escalate()
            try:
                await asyncio.wait_for(self._ended.wait(), limit_s)
                return
            except asyncio.TimeoutError:
                continue
        raise LaunchError(
            f"the agent, pid {self.agent_pid}, or its guard, pid {self.guard_pid}, did not end {_KILLED_S} s after SIGKILL; "
            "see their state in /proc"
        )

    def kill_agent(self) -> None:
        """Have the guard kill the agent, with everything that it leaves."""
        if not self._is_guard_reaped:
            with contextlib.suppress(ProcessLookupError):  # where the caller ignores SIGCHLD, nobody but the kernel reaps it
                signal.pidfd_send_signal(self._guard_pidfd, KILL_AGENT)

    def kill_both(self) -> None:
        """Kill guard and agent; ranks die with the agent, but what they have started in sessions of its own may live on."""
        if not self._ended.is_set():
            with contextlib.suppress(ProcessLookupError):  # they have ended, and we have yet to read it
                os.killpg(self.guard_pid, signal.SIGKILL)

    def _handle(self, record: AgentRecord) -> None:
        if isinstance(record, AgentStarted):
            self.agent_pid = record.pid
        if isinstance(record, GuardGone):
            self._is_guard_gone = True
        else:
            self._on_record(record)

    def _on_stream_end(self, error: BadFrameError | None) -> None:
        self._is_silent = True
        self._on_silence(error)
        self._check_ended()

    def _on_guard_end(self) -> None:
        self._loop.remove_reader(self._guard_pidfd)
        code = self._guard.wait()
        self._is_guard_reaped = True
        os.close(self._guard_pidfd)
        self._stream.drain()
        if self._is_guard_gone or not self._is_silent:
            who = f"the guard of this node's agent, pid {self.guard_pid},"
        else:
            who = "the agent of this node" + (f", pid {self.agent_pid}," if self.agent_pid else "")
        self._on_end(f"{who} {describe_exit(code)}")
        self._check_ended()

    def _check_ended(self) -> None:
        if self._is_guard_reaped and self._is_silent and not self._ended.is_set():
            self._stream.close()
            self._handover.close()
            self._ended.set()


def _execute_guard(stream_fd: int, handover_fd: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "zspmd.runtime.launch.guard", str(os.getpid()), str(handover_fd)],
        stdin=stream_fd,
        stdout=stream_fd,
        stderr=None if _has_stderr() else subprocess.DEVNULL,
        start_new_session=True,
        # Not the caller's directory: a file there must not be taken for a module of the same name.
        cwd="/",
        env=_environment(),
        pass_fds=(handover_fd,),
    )


def _environment() -> dict[str, str]:
    """Return this process's environment, in which the modules are found that it has found itself, in another directory too."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}


def _has_stderr() -> bool:
    """Say whether descriptor 2 is standard error, which a child gets; where it was closed, it is nothing or another file by now."""
    try:
        return os.get_inheritable(2)
    except OSError:
        return False
