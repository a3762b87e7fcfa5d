"""What ``zspmd-run`` shows of a script's ranks: their standard output on its own, their standard error on its own, line by line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from .line_writer import MAX_PENDING_BYTES, LineWriter
from .options import ScriptOptions

_OUT_FD, _ERR_FD = 1, 2


class ScriptConsole:
    """Shows the lines of ranks behind ``[rank N]``, and the launcher's own on stderr behind ``[zspmd]``.

    A launch of one rank has no prefix, so that its lines can be piped on. ``on_output_closed`` is
    called, from another thread, when nobody reads standard output any longer.
    """

    def __init__(self, options: ScriptOptions, on_output_closed: Callable[[], None]) -> None:
        width = len(str(options.world_size - 1))
        self._prefixes = [f"[rank {rank:>{width}}] " if options.has_prefix else "" for rank in range(options.world_size)]
        self._hidden = options.hidden
        self._on_output_closed = on_output_closed
        self._out = LineWriter(self._on_closed)
        # One thread for both where they lead to the same place, so that no line is torn by one of the other stream.
        self._err = self._out if _is_same_file(_OUT_FD, _ERR_FD) else LineWriter(self._on_closed)

    def show(self, rank: int, stream: str, lines: Iterable[str]) -> None:
        """Show whole lines of a rank, unless they go to its log file only."""
        if (rank, stream) in self._hidden:
            return
        prefix = self._prefixes[rank]
        data = "".join(f"{prefix}{line}\n" for line in lines).encode(errors="replace")
        if stream == "out":
            self._out.write(_OUT_FD, data)
        else:
            self._err.write(_ERR_FD, data)

    def say(self, text: str) -> None:
        """Show a line of the launcher's own, or several."""
        self._err.write(_ERR_FD, f"[zspmd] {text}\n".encode(errors="replace"))

    @property
    def is_behind(self) -> bool:
        """Whether so much waits to be read that ranks had better wait too."""
        return max(self._out.pending_bytes, self._err.pending_bytes) > MAX_PENDING_BYTES // 2

    def is_shown(self) -> bool:
        """Say whether everything has left."""
        return self._out.flush(0.0) and self._err.flush(0.0)

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
