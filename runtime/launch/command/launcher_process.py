"""What ``zspmd-run`` does about its own process: its standard streams, the signals that end it, and what a killed agent leaves to it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator

from ....process import become_subreaper, end_children, has_children

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ORPHANS_S = 2.0
# Of this process, for the records of its launches: an Engine does not know who has made it.
_KIND = {"this": "embedded"}


def open_standard_streams() -> None:
    """Put /dev/null where a standard stream was closed by whoever started us; else the loop's first descriptors would take its place."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


def run_as_launcher() -> None:
    """Say that this process is ``zspmd-run``, which ends its launches in order at SIGTERM."""
    _KIND["this"] = "program"


def launcher_kind() -> str:
    """Return "program" in ``zspmd-run``, and "embedded" in a program that is somebody's own."""
    return _KIND["this"]


def is_output_closed() -> bool:
    """Say whether nobody reads standard output any longer; if so it leads to /dev/null from now on, for what Python has yet to flush."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    is_closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if is_closed:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    return is_closed


@contextlib.contextmanager
def orphans_ended() -> Iterator[None]:
    """Adopt what ranks have started when their agent is killed, and end it; an agent that lives does that itself.

    A process that was executed over one with children (``sh -c "job & exec zspmd-run ..."``) has them too, and leaves them alone.
    """
    is_alone = not has_children()
    if is_alone:
        become_subreaper()
    try:
        yield
    finally:
        if is_alone and (left := end_children(_ORPHANS_S)):
            print(f"zspmd-run: pids {', '.join(map(str, left))} did not end even after SIGKILL; see their state in /proc", file=sys.stderr)


def on_stop_signals(handle: Callable[[int], None]) -> None:
    """Have the running loop call ``handle`` with the number of each signal that asks for the end."""
    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            loop.add_signal_handler(number, handle, number)


def ignore_stop_signals() -> None:
    """Let no further signal change how this process ends: nothing is left to be ended, and its exit code is known."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
