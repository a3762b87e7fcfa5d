"""The parent of an agent, which ends what an agent that is killed would leave: ``python -m zspmd.runtime.launch.guard``.

    driver ──starts──> guard ──forks at once──> agent ──> ranks, and what they start
                         only waits               does the work (``agent.py``)

Each of the three notices the end of either other, so that no single SIGKILL, and none of the driver with one of the others, leaves
anything; until it has forked, the guard is both. The guard is the subreaper above the agent: whatever the agent had becomes its
own when the agent ends. An agent that is there still some seconds after the driver's end (stopped, say) is killed. The guard
imports little and reads nothing, so that there is little that could end it.

On another node, where ``--stdio`` stands for the driver, whatever started the guard there (sshd, say) is in the driver's place: the
stream ends when it ends. A line of text comes first on standard output, by which the driver tells it from what a login prints, with a
newline in front of it, since that may have ended without one.

SIGTERM, SIGHUP and SIGQUIT are passed on to the agent; ``KILL_AGENT`` has the agent killed, and the guard do the rest.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import socket
import sys
import time

from ... import __version__
from ...errors import describe_exit
from ...process import become_subreaper, end_children, name_process
from .run_directory import RunDirectory, remove_dead_directories

GUARD_NAME = "zspmd-guard"  # as its process is called
KILL_AGENT = signal.SIGUSR1
# Then the version, a space, the pid of the guard, and a newline.
GREETING = b"ZSPMD/1 "
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_AWAITED = (signal.SIGCHLD, KILL_AGENT, *_PASSED_ON)
_REAP_S = 2.0
_LOOK_PERIOD_S = 1.0
# An agent without a driver has this long, and that period at most, to end all that it has.
_ALONE_S = 1.5


def main() -> None:
    """Fork the agent and wait for its end: ``guard DRIVER_PID HANDOVER_FD``, with the driver's stream on standard input and output.

    HANDOVER_FD is the end of a packet socket in which ``RunDirectory.hand_over`` leaves the directory of the launch. ``guard --stdio``
    is called on another node.
    """
    giver: socket.socket | None = None
    if sys.argv[1:] == ["--stdio"]:
        driver_pid = os.getppid()
        giver, handover = _greet()
    else:
        driver_pid, handover = int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
        handover.set_inheritable(False)
    become_subreaper()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a driver that ignores it would have the kernel reap our children
    signal.pthread_sigmask(signal.SIG_SETMASK, _AWAITED)
    driver_pidfd = _open_driver(driver_pid)
    if driver_pidfd is None:
        return _clean_up(handover, driver_pid)
    guard_pidfd = os.pidfd_open(os.getpid())
    agent_pid = os.fork()
    if agent_pid == 0:
        from .agent import serve  # what it imports is no burden to the guard

        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        serve(driver_pidfd, guard_pidfd, handover, giver)
        sys.stderr.flush()
        os._exit(0)  # the driver waits, and all is closed: tidying up would take some milliseconds more
    name_process(GUARD_NAME)
    _leave_streams()
    if giver is not None:
        giver.close()
    for pidfd in (driver_pidfd, guard_pidfd):
        os.close(pidfd)
    exit_code = os.waitstatus_to_exitcode(_wait_ended(agent_pid, driver_pid))
    if giver is not None and exit_code < 0:  # what carries the stream of another node tells its driver no more than that it ended
        _say(f"the agent of this node, pid {agent_pid}, {describe_exit(exit_code)}")
    if left := end_children(_REAP_S):
        _say(f"pids {', '.join(map(str, left))} did not end even after SIGKILL; see their state in /proc")
    _clean_up(handover, driver_pid)
    _end_likewise(exit_code)


def _greet() -> tuple[socket.socket, socket.socket]:
    """Say that this is an agent, and return both ends of a handover, since the agent makes the directory itself."""
    if os.getsid(0) != os.getpid():
        os.setsid()  # sshd has done it
    os.write(1, b"\n" + GREETING + f"{__version__} {os.getpid()}\n".encode())
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _open_driver(pid: int) -> int | None:
    """Return a pidfd of the driver, or None when it has ended already; its pid may name another process by then."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    return pidfd if os.getppid() == pid else None


def _leave_streams() -> None:
    """Let go of the driver's stream, so that it ends for the driver when the agent ends."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _wait_ended(agent_pid: int, driver_pid: int) -> int:
    """Pass signals on until the agent has ended; return its status."""
    kill_at = math.inf
    while True:
        arrived = signal.sigtimedwait(_AWAITED, _LOOK_PERIOD_S)
        number = signal.SIGCHLD if arrived is None else arrived.si_signo
        if os.getppid() != driver_pid:
            kill_at = min(kill_at, time.monotonic() + _ALONE_S)
        if number == KILL_AGENT or time.monotonic() > kill_at:
            number = signal.SIGKILL
        if number != signal.SIGCHLD:
            os.kill(agent_pid, number)  # not reaped yet: it names nobody else
        pid, status = os.waitpid(agent_pid, os.WNOHANG)
        if pid:
            return status


def _clean_up(handover: socket.socket, driver_pid: int) -> None:
    """Remove the launch's directory; when the driver is gone, also one that it had no time to hand over."""
    try:
        directory = RunDirectory.handed_over(handover)
        if directory is not None:
            directory.remove()
        if os.getppid() != driver_pid:
            remove_dead_directories()
    except OSError as error:
        _say(f"the run directory could not be removed: {error}")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # whoever read it may be gone, and what is left to do is worth more
        print(f"zspmd: {text}", file=sys.stderr, flush=True)


def _end_likewise(exit_code: int) -> None:
    """End as the agent has ended, since the driver sees this process's end alone."""
    if exit_code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the agent has left a core file, if anybody wants one
        if exit_code != -signal.SIGKILL:
            signal.signal(-exit_code, signal.SIG_DFL)
        os.kill(os.getpid(), -exit_code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (-exit_code,))  # and no other, which may be pending
    os._exit(exit_code)  # a driver waits for it, and there is nothing to tidy up


if __name__ == "__main__":
    main()
