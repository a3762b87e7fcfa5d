"""How the ranks of a script ended, which end came first, and what to tell about it. No I/O.

Ends are sorted like this, and within a class by time:

    0   by itself, for a reason of its own
    1   by itself, with an error that the end of another rank explains
    2   after this launch had begun to end its ranks

The traceback is looked for where the rank has left it: the report that torch's ``@record`` writes, then the last traceback on its
stderr, then what ``faulthandler`` printed there.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ...errors import describe_exit
from .faults import is_peer_loss

MAX_TRACEBACK_LINES = 80
MAX_TAIL_LINES = 10
_TRACEBACK = "Traceback (most recent call last):"
_FATAL = "Fatal Python error:"
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_TORCH_PREFIX = re.compile(r"\[rank\d+\]: ?")  # torch.distributed puts it before each line of an uncaught exception


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended.

    Args:
        exit_code: as in subprocess, negative for a signal.
        at_s: seconds since the start of the ranks.
        is_spontaneous: nobody had asked for it.
        stderr: its last lines there; ``tail`` those of both streams.
        error_report: what it wrote to TORCHELASTIC_ERROR_FILE.
    """

    rank: int
    pid: int
    exit_code: int
    at_s: float
    is_spontaneous: bool
    stderr: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()
    error_report: str = ""

    @cached_property
    def traceback(self) -> tuple[str, ...]:
        """The rank's last traceback, at most ``MAX_TRACEBACK_LINES``; empty where there is none."""
        return read_report(self.error_report) or find_traceback(self.stderr)

    @property
    def reason(self) -> str:
        """The exception in one line, or what the rank printed last; empty where it printed nothing."""
        lines = [line for line in self.traceback if line and not line[0].isspace()] or self.tail
        return lines[-1].strip()[:300] if lines else ""

    @property
    def is_consequence(self) -> bool:
        """Whether the loss of another rank explains the end."""
        return is_peer_loss("\n".join(self.traceback[-8:] or self.tail[-MAX_TAIL_LINES:]))

    @property
    def severity(self) -> int:
        if not self.is_spontaneous:
            return 2
        return 1 if self.is_consequence else 0

    def describe(self) -> str:
        """Say in words how it ended."""
        if not self.is_spontaneous and self.exit_code in (-signal.SIGTERM, -signal.SIGKILL):
            return f"was ended by zspmd-run ({signal.Signals(-self.exit_code).name})"
        return describe_exit(self.exit_code) + ("" if self.is_spontaneous else " after zspmd-run had sent it SIGTERM")


def first_cause(ends: Sequence[RankEnd]) -> RankEnd | None:
    """Return the end that explains the others; None where every rank exited with 0."""
    failed = [end for end in ends if end.exit_code != 0]
    return min(failed, key=lambda end: (end.severity, end.at_s), default=None)


def exit_code_of(end: RankEnd) -> int:
    """Return the exit code for the launch as a whole: the rank's own, or 128 and the signal."""
    return 128 - end.exit_code if end.exit_code < 0 else end.exit_code


def summarise(cause: RankEnd, ends: Sequence[RankEnd], *, host: str, log_dir: str | None) -> str:
    """Return what to tell the user: the first cause with its traceback or last lines, then the others as its consequences.

    Where a peer was lost and none has failed for a reason of its own, those that were done early explain it: ranks with less data.
    """
    lines = [
        f"FAILED with exit code {exit_code_of(cause)}",
        f"  first cause  rank {cause.rank} on {host}, pid {cause.pid}, {cause.describe()}, {cause.at_s:.3f} s after the start",
    ]
    if cause.traceback:
        lines += ["  traceback", *(f"    {line}" for line in cause.traceback)]
    elif cause.tail:
        lines += ["  last lines", *(f"    {line}" for line in cause.tail[-MAX_TAIL_LINES:])]
    done = [end for end in ends if end.exit_code == 0] if cause.severity == 1 else []
    if done:
        lines += ["  while these were done already", *(f"    rank {end.rank} {_consequence(end, cause)}" for end in done)]
    others = sorted((end for end in ends if end is not cause and end.exit_code != 0), key=lambda end: end.at_s)
    if others:
        lines += ["  then", *(f"    rank {end.rank} {_consequence(end, cause)}" for end in others)]
    if log_dir is not None:
        lines.append(f"  logs         {log_dir}")
    return "\n".join(lines)


def read_report(text: str) -> tuple[str, ...]:
    """Return the traceback in a report of torch's ``@record``, or its message; empty for no report or one of another form."""
    try:
        message = json.loads(text)["message"] if text else ""
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
    if isinstance(message, dict):
        extra = message.get("extraInfo")
        message = (extra.get("py_callstack") if isinstance(extra, dict) else None) or message.get("message")
    return _cut(message.rstrip().splitlines()) if isinstance(message, str) else ()


def find_traceback(stderr: Sequence[str]) -> tuple[str, ...]:
    """Return the last traceback among lines of stderr, with those that led to it, or the text of ``faulthandler``."""
    lines = [_TORCH_PREFIX.sub("", line, count=1) for line in stderr]
    fatal = _last(lines, _FATAL)
    if fatal is not None:
        return _cut(lines[fatal:])
    start = end = _last(lines, _TRACEBACK)
    if start is None or end is None:
        return ()
    end += 1
    while end < len(lines) and (not lines[end] or lines[end][0].isspace()):
        end += 1
    while (before := _last(lines[:start], _TRACEBACK)) is not None and any(line.startswith(_CHAINED) for line in lines[before:start]):
        start = before
    return _cut(lines[start : end + 1])


def _consequence(end: RankEnd, cause: RankEnd) -> str:
    reason = f": {end.reason}" if end.reason and end.exit_code != 0 and (end.is_spontaneous or end.traceback) else ""
    return f"{end.describe()}, {end.at_s - cause.at_s:+.3f} s{reason}"


def _last(lines: Sequence[str], text: str) -> int | None:
    return next((index for index in reversed(range(len(lines))) if text in lines[index]), None)


def _cut(lines: Sequence[str]) -> tuple[str, ...]:
    """Leave out the middle of what is long: a traceback begins with where and ends with what."""
    if len(lines) <= MAX_TRACEBACK_LINES:
        return tuple(lines)
    half = MAX_TRACEBACK_LINES // 2
    return (*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:])
