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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...errors import describe_exit
from ..launch.command.folding import fold_numbers
from .faults import is_peer_loss

MAX_TRACEBACK_LINES = 80
MAX_TAIL_LINES = 10
MAX_ALIKE = 8
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
        host: the node's name, where there are several; ``error_s`` is by how much ``at_s`` may be off then.
    """

    rank: int
    pid: int
    exit_code: int
    at_s: float
    is_spontaneous: bool
    stderr: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()
    error_report: str = ""
    host: str = ""
    error_s: float = 0.0

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

    @property
    def place(self) -> str:
        """What to call it."""
        return f"rank {self.rank} @ {self.host}" if self.host else f"rank {self.rank}"

    def as_dict(self) -> dict[str, Any]:
        """Return it for a report."""
        return {
            "rank": self.rank,
            "host": self.host,
            "pid": self.pid,
            "exit_code": self.exit_code,
            "at_s": round(self.at_s, 6),
            "error_s": round(self.error_s, 6),
            "is_spontaneous": self.is_spontaneous,
            "is_consequence": self.is_spontaneous and self.exit_code != 0 and self.is_consequence,
            "how": self.describe(),
            "reason": self.reason if self.exit_code else "",
            "traceback": list(self.traceback) if self.exit_code else [],
        }

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


def rivals(cause: RankEnd, ends: Sequence[RankEnd]) -> list[RankEnd]:
    """Return the ends that may have come before ``cause``: of the same kind, and nearer to it than their clocks can tell."""
    return [
        end
        for end in ends
        if end is not cause
        and end.exit_code != 0
        and end.severity == cause.severity < 2
        and end.host != cause.host
        and end.at_s - cause.at_s <= end.error_s + cause.error_s
    ]


def cause_of(end: RankEnd) -> dict[str, Any]:
    """Return a rank's end as the cause in a report."""
    return {"kind": "rank_signal" if end.exit_code < 0 else "rank_exit", **end.as_dict()}


def summarise(
    cause: RankEnd,
    ends: Sequence[RankEnd],
    *,
    host: str,
    log_dir: str | None,
    tail: int = MAX_TAIL_LINES,
    cleanup: str | None = None,
    report: str | None = None,
) -> str:
    """Return what to tell the user: the first cause with its traceback or last lines, then the others as its consequences.

    Where a peer was lost and none has failed for a reason of its own, those that were done early explain it: ranks with less data.

    Args:
        host: of the ranks whose end names none.
        cleanup: what was found when all was over; ``report`` is the path of the launch's report.
    """
    others = sorted((end for end in ends if end is not cause and end.exit_code != 0), key=lambda end: end.at_s)
    doubtful = rivals(cause, others)
    lines = [f"FAILED with exit code {exit_code_of(cause)}", f"  first cause  {_first(cause, host)}"]
    lines += [f"  or           {_first(end, host)}; the clocks of the two nodes do not tell" for end in doubtful]
    if cause.traceback:
        lines += ["  traceback", *(f"    {line}" for line in cause.traceback)]
    elif cause.tail and tail:
        lines += ["  last lines", *(f"    {line}" for line in cause.tail[-tail:])]
    done = [end for end in ends if end.exit_code == 0] if cause.severity == 1 else []
    if done:
        lines += ["  while these were done already", *_consequences(done, cause)]
    if others := [end for end in others if end not in doubtful]:
        lines += ["  then", *_consequences(others, cause)]
    return "\n".join([*lines, *_facts({"cleanup": cleanup, "logs": log_dir, "report": report})])


def summarise_loss(what: str, exit_code: int, ends: Sequence[RankEnd], facts: Mapping[str, str | None]) -> str:
    """Return what to tell the user of a node that is lost, and of the ranks elsewhere that ended because of it.

    Args:
        facts: by name what stands at the end, None for nothing.
    """
    lines = [f"FAILED with exit code {exit_code}", f"  first cause  {what}"]
    if others := sorted((end for end in ends if end.exit_code != 0), key=lambda end: end.at_s):
        lines += ["  then", *_consequences(others, others[0])]
    return "\n".join([*lines, *_facts(facts)])


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


def _first(end: RankEnd, host: str) -> str:
    if not end.host:
        return f"rank {end.rank} on {host}, pid {end.pid}, {end.describe()}, {end.at_s:.3f} s after the start"
    error = f" \N{PLUS-MINUS SIGN}{end.error_s * 1e3:.1f} ms" if end.error_s else ""
    return f"{end.place} pid {end.pid}  {end.describe()}  at {end.at_s:+.3f} s{error}"


def _consequences(ends: Sequence[RankEnd], cause: RankEnd) -> list[str]:
    """Return a line for each, and one for all that a launch of many ranks has ended in the same way."""
    alike: dict[str, list[RankEnd]] = {}
    for end in ends:
        if not end.is_spontaneous and not end.traceback:
            alike.setdefault(end.describe(), []).append(end)
    many = {how: found for how, found in alike.items() if len(found) > MAX_ALIKE}
    lines = [f"    {end.place} {_consequence(end, cause)}" for end in ends if end not in many.get(end.describe(), ())]
    for how, found in many.items():
        ranks = fold_numbers(sorted(end.rank for end in found))
        lines.append(f"    ranks {ranks} {how.replace('was', 'were', 1)}, up to {max(end.at_s for end in found) - cause.at_s:+.3f} s")
    return lines


def _consequence(end: RankEnd, cause: RankEnd) -> str:
    reason = f": {end.reason}" if end.reason and end.exit_code != 0 and (end.is_spontaneous or end.traceback) else ""
    return f"{end.describe()}, {end.at_s - cause.at_s:+.3f} s{reason}"


def _facts(facts: Mapping[str, str | None]) -> list[str]:
    return [f"  {name:<12} {value}" for name, value in facts.items() if value is not None]


def _last(lines: Sequence[str], text: str) -> int | None:
    return next((index for index in reversed(range(len(lines))) if text in lines[index]), None)


def _cut(lines: Sequence[str]) -> tuple[str, ...]:
    """Leave out the middle of what is long: a traceback begins with where and ends with what."""
    if len(lines) <= MAX_TRACEBACK_LINES:
        return tuple(lines)
    half = MAX_TRACEBACK_LINES // 2
    return (*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:])
