"""What ``zspmd-run`` shows of a script's ranks: their standard output on its own, their standard error on its own, line by line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence

from ..plan import LaunchPlan
from .line_writer import MAX_PENDING_BYTES, LineWriter
from .log_directory import LauncherLog
from .options import ScriptOptions
from .rank_prefixes import plan_prefixes, rank_prefixes

_OUT_FD, _ERR_FD = 1, 2


class ScriptConsole:
    """Shows the lines of ranks behind ``[rank N]``, or ``[N@HOST]``, and the launcher's own on stderr behind ``[zspmd]``.

    A launch of one rank has no prefix, so that its lines can be piped on. ``use_plan`` comes before the first line of a rank where the
    options do not say how many ranks there are, or there are several nodes. ``on_output_closed`` is called, from another thread, when
    nobody reads standard output any longer.
    """

    def __init__(self, options: ScriptOptions, on_output_closed: Callable[[], None]) -> None:
        self._options = options
        self._hidden: frozenset[tuple[int, str]] = frozenset()
        self._prefixes: list[str] = []
        self._has_prefix = options.has_prefix
        self._started_at = time.monotonic()
        self._on_output_closed = on_output_closed
        self._out = LineWriter(self._on_closed)
        # One thread for both where they lead to the same place, so that no line is torn by one of the other stream.
        self._err = self._out if _is_same_file(_OUT_FD, _ERR_FD) else LineWriter(self._on_closed)
        self._log = LauncherLog(options.launcher_log, self._show_own)
        if options.world_size is not None:
            self._use(rank_prefixes(options.world_size))

    def use_plan(self, plan: LaunchPlan) -> None:
        """Take names and number of the ranks from a plan, and the time of the first ``+0.000`` from now.

        Raises:
            ConfigError: options name a rank that is not there.
        """
        self._has_prefix = self._options.has_prefix and (plan.world_size > 1 or self._options.manual is not None)
        self._started_at = time.monotonic()
        self._use(plan_prefixes(plan))

    def show(self, rank: int, stream: str, lines: Iterable[str]) -> None:
        """Show whole lines of a rank, unless they go to its log file only."""
        if (rank, stream) not in self._hidden:
            self._write(_OUT_FD if stream == "out" else _ERR_FD, rank, lines)

    def show_failed(self, rank: int, tail: Sequence[str]) -> None:
        """Show the last lines of a rank that has failed, where ``--console failed`` has kept its lines back until now."""
        if self._options.shown.is_failed and self._options.tail:
            self._write(_ERR_FD, rank, tail[-self._options.tail :])

    def say(self, text: str) -> None:
        """Show a line of the launcher's own, or several."""
        self._show_own(text)
        self._log.write(text)

    @property
    def is_behind(self) -> bool:
        """Whether so much waits to be read that ranks had better wait too."""
        return max(self._out.pending_bytes, self._err.pending_bytes) > MAX_PENDING_BYTES // 2

    def is_shown(self) -> bool:
        """Say whether everything has left."""
        return self._out.flush(0.0) and self._err.flush(0.0)

    def _use(self, prefixes: list[str]) -> None:
        self._hidden = self._options.shown.hidden(len(prefixes))
        self._prefixes = prefixes if self._has_prefix else [""] * len(prefixes)

    def _write(self, fd: int, rank: int, lines: Iterable[str]) -> None:
        before = f"{time.monotonic() - self._started_at:+11.3f} " if self._options.has_timestamps else ""
        prefix = before + self._prefixes[rank]
        data = "".join(f"{prefix}{line}\n" for line in lines).encode(errors="replace")
        (self._out if fd == _OUT_FD else self._err).write(fd, data)

    def _show_own(self, text: str) -> None:
        self._err.write(_ERR_FD, f"[zspmd] {text}\n".encode(errors="replace"))

    def _on_closed(self, fd: int, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            if fd == _OUT_FD:
                self._on_output_closed()
        elif fd == _OUT_FD:  # a full disk, say; of stderr nothing can be told
            self.say(f"standard output takes no more: {error}; the launch goes on")


def _is_same_file(left: int, right: int) -> bool:
    try:
        return os.path.samestat(os.fstat(left), os.fstat(right))
    except OSError:  # one of them was closed by whoever started us
        return False
