"""What ``zspmd-run`` shows of its ranks: their lines behind a prefix, and a bar each while they load.

On a terminal the bars are live (rich); elsewhere each rank gets a plain line when it is done. All of it goes to stderr, so that
stdout holds nothing but a program's own output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from .log_directory import LauncherLog
from .rank_prefixes import rank_prefixes
from .shown_streams import ShownStreams


class RankConsole:
    """Shows rank lines and set-up progress of one launch; a context manager, ``finish_loading`` removes the bars earlier.

    ``on_log`` and ``on_progress`` fit the arguments of those names of ``zspmd.launch``.

    Args:
        hosts: names by rank, where the ranks are on several nodes and it is known which is where.
        shown: whose lines are shown.
        launcher_log: a file for the launcher's own lines.
    """

    def __init__(
        self,
        world_size: int,
        *,
        is_quiet: bool = False,
        hosts: Sequence[str] = (),
        has_prefix: bool = True,
        shown: ShownStreams | None = None,
        launcher_log: str | None = None,
    ) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False)
        self._prefixes = rank_prefixes(world_size, hosts) if has_prefix else [""] * world_size
        self._width = len(str(world_size - 1))
        self._hidden = (shown or ShownStreams()).hidden(world_size)
        self._log = LauncherLog(launcher_log, lambda text: self._print(f"[zspmd] {text}"))
        self._is_quiet = is_quiet
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}

    def __enter__(self) -> RankConsole:
        if self._console.is_terminal and not self._is_quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish_loading()

    def on_log(self, rank: int, stream: str, line: str) -> None:
        """Print one line of a rank behind ``[rank N]``, or ``[N@HOST]``."""
        if (rank, stream) not in self._hidden:
            self._print(f"{self._prefixes[rank]}{line}")

    def on_progress(self, rank: int, done: int, total: int, what: str) -> None:
        """Move a rank's bar, or say in a line that it is done."""
        if self._is_quiet:
            return
        if self._bars is None:
            if done >= total:
                self.say(f"rank {rank}: {what} loaded, {total / 1e6:.1f} MB")
            return
        if rank not in self._tasks:
            self._tasks[rank] = self._bars.add_task(f"rank {rank:>{self._width}} {what}", total=total)
        self._bars.update(self._tasks[rank], completed=done, total=total)

    def say(self, text: str) -> None:
        """Print a line of the launcher's own."""
        if not self._is_quiet:
            self._print(f"[zspmd] {text}")
        self._log.write(text)

    def finish_loading(self) -> None:
        """Remove the bars; idempotent."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _print(self, line: str) -> None:
        if self._bars is not None:
            self._console.print(line, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
