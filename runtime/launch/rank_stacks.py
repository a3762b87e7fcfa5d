"""What a rank is doing, found without its help: the kernel's word, and what faulthandler writes from a signal handler in C.

    agent                                            rank
      file in memory, appended to  ──────────────>   process.offer_stacks: STACKS_SIGNAL writes the stacks there
      empty it, send STACKS_SIGNAL ──────────────>   handler runs on the main thread, with or without the GIL
      /proc/PID/status: not pending, not being handled
      <────────────────────────── read the file

The signal is sent only to a process that has said that it handles it; to any other it would be the end.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass

from ... import process
from .agent_protocol import MAX_STACK_CHARACTERS

ANSWER_S = 0.4
_POLL_S = 0.005
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in an uninterruptible sleep (a disk, a network file system, a device)",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "ended, not yet reaped",
    "X": "ended, not yet reaped",
    "I": "idle",
}
_STOPPED = ("T", "t", "Z", "X")
_SIGNAL_BIT = 1 << (process.STACKS_SIGNAL - 1)


@dataclass(frozen=True)
class KernelView:
    """What /proc says of a process.

    Args:
        state: the kernel's letter for its main thread.
        place: the kernel function in which that thread waits; empty where it waits nowhere, or the kernel does not tell.
        handles_signal: whether it has a handler for ``STACKS_SIGNAL``.
        is_answering: whether such a signal waits for it, or its main thread is in the handler.
    """

    state: str
    place: str
    handles_signal: bool
    is_answering: bool

    @classmethod
    def read(cls, pid: int) -> KernelView:
        """Look at a process.

        Raises:
            OSError: there is no such process.
        """
        with open(f"/proc/{pid}/status") as status:
            facts = dict(line.split(":", 1) for line in status)
        signals = {name: int(facts.get(name, "0"), 16) & _SIGNAL_BIT for name in ("SigPnd", "ShdPnd", "SigBlk", "SigCgt")}
        is_answering = bool(signals["SigPnd"] or signals["ShdPnd"] or signals["SigBlk"])
        return cls(facts["State"].split()[0], _place(pid), bool(signals["SigCgt"]), is_answering)

    def __str__(self) -> str:
        return f"the kernel says: {_STATES.get(self.state, self.state)}" + (f" in {self.place}" if self.place else "")


class RankStacks:
    """The file in memory through which one rank tells its stacks; ``open`` before the rank starts, ``take`` while it runs."""

    def __init__(self) -> None:
        self._fd = -1
        self._is_offered = False

    def open(self) -> int:
        """Make the file; return a descriptor for the rank, which the caller closes.

        Raises:
            OSError: no descriptor or memory is left.
        """
        self._fd = os.memfd_create("zspmd-stacks", os.MFD_CLOEXEC)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, os.O_APPEND)  # else the rank would write behind what was truncated
        return os.dup(self._fd)

    async def take(self, pid: int, send_signal: Callable[[int], None]) -> str:
        """Return the kernel's word on the rank in one line, then its Python stacks or why there are none, within ``ANSWER_S``.

        ``pid`` must not be reaped meanwhile, else it could come to name another process; ``send_signal`` sends to it alone.
        """
        try:
            view = KernelView.read(pid)
            if view.state in _STOPPED:
                return str(view)
            if not view.handles_signal or not self._has_offered():
                return f"{view}\nno Python stacks: this process has not offered any; ranks of a worker group do once they run"
            return f"{view}\n{await self._ask(pid, view, send_signal)}"
        except OSError as error:
            return f"the kernel says nothing: {error}"

    def close(self) -> None:
        """Give the file back; safe to call again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    async def _ask(self, pid: int, view: KernelView, send_signal: Callable[[int], None]) -> str:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + ANSWER_S
        if not view.is_answering:  # a process that was stopped may have an earlier request before it; real-time signals pile up
            os.ftruncate(self._fd, 0)
            send_signal(process.STACKS_SIGNAL)
        while loop.time() < deadline:
            await asyncio.sleep(_POLL_S)
            if self._fd < 0:
                return "no Python stacks: it has ended meanwhile"
            if self._size() and not KernelView.read(pid).is_answering:
                return self._read()
        partial = self._read()
        return f"no answer in full within {ANSWER_S:g} s\n{partial}" if partial else f"no Python stacks: no answer within {ANSWER_S:g} s"

    def _has_offered(self) -> bool:
        if not self._is_offered and os.pread(self._fd, len(process.STACKS_READY), 0) == process.STACKS_READY:
            self._is_offered = True
            os.ftruncate(self._fd, 0)
        return self._is_offered

    def _size(self) -> int:
        return os.fstat(self._fd).st_size

    def _read(self) -> str:
        text = os.pread(self._fd, MAX_STACK_CHARACTERS, 0).decode(errors="replace").rstrip()
        rest = self._size() - MAX_STACK_CHARACTERS
        return f"{text}\n... and {rest} B more" if rest > 0 else text


def _place(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/wchan") as wchan:
            place = wchan.read().strip()
    except OSError:  # not told to this user
        return ""
    return "" if place == "0" else place
