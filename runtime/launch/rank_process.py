"""One rank as its agent sees it: a pidfd that tells of its end, two pipes with what it prints, a file for its stacks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from ...errors import describe_exit
from ...process import STACKS_SIGNAL
from .agent_protocol import MAX_ERROR_REPORT_BYTES, AgentWarning, RankExited, RankLog
from .line_splitter import LineSplitter
from .rank_stacks import RankStacks

TAIL_LINES = 40
_CHUNK_BYTES = 64 << 10
# What a rank that has ended can have left in a pipe is one pipe buffer. A grandchild that goes on printing is read no further.
_MAX_DRAIN_BYTES = 4 << 20
# How often the state of a line that is overwritten, such as a progress bar, is told.
_PROGRESS_S = 1.0
_TRACED_S = 0.05
# Signals that end nobody who does not ask for it: for stacks, and to go on.
_NO_END = frozenset((STACKS_SIGNAL, signal.SIGCONT))

Report = Callable[[RankLog | RankExited | AgentWarning], None]


class RankOutput:
    """The read end of a rank's stdout or stderr, copied to a log file when there is one."""

    def __init__(self, rank: int, stream: str, log_dir: str | None, on_lines: Callable[[str, list[str]], None], report: Report) -> None:
        self._rank = rank
        self._stream = stream
        self._on_lines = on_lines
        self._report = report
        self._splitter = LineSplitter()
        self._log_path = None if log_dir is None else Path(log_dir) / f"r{rank:05d}.{stream}"
        self._log_fd = -1
        self._read_fd = -1
        self._is_reading = False
        self._progress: asyncio.TimerHandle | None = None

    def open(self) -> int:
        """Begin to read; return the write end for the rank, which the caller closes once the rank has it.

        Raises:
            OSError: the log file cannot be opened.
        """
        if self._log_path is not None:
            self._log_fd = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._read_fd, write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self.set_reading(True)
        return write_fd

    def set_reading(self, is_reading: bool) -> None:
        """Read what comes, or leave it in the pipe, where a rank that prints more has to wait."""
        if self._read_fd < 0 or is_reading == self._is_reading:
            return
        self._is_reading = is_reading
        if is_reading:
            asyncio.get_running_loop().add_reader(self._read_fd, self._read)
        else:
            asyncio.get_running_loop().remove_reader(self._read_fd)

    def drain(self) -> None:
        """Read what is there by now, and report a last line without a newline."""
        size = 0
        while self._read_fd >= 0 and size < _MAX_DRAIN_BYTES:
            count = self._read()
            if not count:
                break
            size += count
        self._emit(self._splitter.flush())

    def close(self) -> None:
        """Stop reading; safe to call again."""
        if self._progress is not None:
            self._progress.cancel()
            self._progress = None
        if self._read_fd >= 0:
            self.set_reading(False)
            os.close(self._read_fd)
            self._read_fd = -1
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1

    def _read(self) -> int:
        try:
            data = os.read(self._read_fd, _CHUNK_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            self._emit(self._splitter.flush())
            self.close()
            return 0
        self._save(data)
        self._emit(self._splitter.feed(data))
        if self._progress is None and self._splitter.is_overwritten:
            self._progress = asyncio.get_running_loop().call_later(_PROGRESS_S, self._show_progress)
        return len(data)

    def _show_progress(self) -> None:
        self._progress = None
        self._emit(self._splitter.take_state())

    def _save(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while self._log_fd >= 0 and rest:
                rest = rest[os.write(self._log_fd, rest) :]
        except OSError as error:
            os.close(self._log_fd)
            self._log_fd = -1
            self._report(AgentWarning(f"rank {self._rank}: {self._log_path} is written no further: {error}; the launch goes on"))

    def _emit(self, lines: list[str]) -> None:
        if lines:
            self._on_lines(self._stream, lines)


class RankProcess:
    """A rank from its start to the report of its end.

    ``open`` comes first and returns what the process is to write to; ``watch`` follows once it has a pid. After its end,
    and after everything that it printed was read, one ``RankExited`` is reported and ``on_exit`` called.
    """

    def __init__(self, rank: int, log_dir: str | None, report: Report, on_exit: Callable[[], None], error_file: str | None = None) -> None:
        self.rank = rank
        self.pid = 0
        self.exit_code: int | None = None
        self._was_signalled = False
        self._report = report
        self._on_exit = on_exit
        self._error_file = error_file
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._outputs = [RankOutput(rank, stream, log_dir, self._on_lines, report) for stream in ("out", "err")]
        self._stacks = RankStacks()
        self._pidfd = -1

    @property
    def is_running(self) -> bool:
        return self.pid > 0 and self.exit_code is None

    def open(self) -> tuple[int, int, int]:
        """Return descriptors for the rank, which the caller closes: its stdout, its stderr, the file for its stacks.

        Raises:
            OSError: a log file cannot be opened, or no descriptor is left.
        """
        fds: list[int] = []
        try:
            for open_part in (*(output.open for output in self._outputs), self._stacks.open):
                fds.append(open_part())
        except OSError:
            for fd in fds:
                os.close(fd)
            self.close()
            raise
        stdout, stderr, stacks = fds
        return stdout, stderr, stacks

    def watch(self, pid: int) -> None:
        """Take charge of a child of this process, which may have ended already."""
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    def set_reading(self, is_reading: bool) -> None:
        """Read what the rank prints, or let it wait."""
        for output in self._outputs:
            output.set_reading(is_reading)

    def signal(self, number: int) -> None:
        """Send a signal to the rank's process alone; nothing happens when it has ended, or runs as another user (``sudo``)."""
        if self.is_running:
            self._was_signalled |= number not in _NO_END
            with contextlib.suppress(PermissionError):
                signal.pidfd_send_signal(self._pidfd, number)

    def signal_group(self, number: int) -> None:
        """Send a signal to those of the rank's process group that run as this user; nothing happens when the rank has ended.

        The pid of a rank that is not reaped cannot name anything else, so this never hits a stranger.
        """
        if self.is_running:
            self._was_signalled |= number not in _NO_END
            with contextlib.suppress(PermissionError):
                os.killpg(self.pid, number)

    async def take_stacks(self) -> str:
        """Return what the rank is doing, as ``RankStacks.take`` says it."""
        return await self._stacks.take(self.pid, self.signal) if self.is_running else describe_exit(self.exit_code or 0)

    def close(self) -> None:
        """Read no further, whoever still prints; safe to call again."""
        for output in self._outputs:
            output.close()
        self._stacks.close()

    def _reap(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        ended_ns = time.monotonic_ns()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:  # a debugger has it, and must see its end first
            loop.call_later(_TRACED_S, self._reap)
            return
        os.close(self._pidfd)
        self._stacks.close()
        for output in self._outputs:
            output.drain()
        self.exit_code = os.waitstatus_to_exitcode(status)
        end = RankExited(self.rank, self.pid, self.exit_code, tuple(self._tail), self._error_report(), ended_ns, self._was_signalled)
        self._report(end)
        self._on_exit()

    def _error_report(self) -> str:
        if self._error_file is None or not os.path.isfile(self._error_file):
            return ""
        try:
            with open(self._error_file, errors="replace") as file:
                return file.read(MAX_ERROR_REPORT_BYTES // 4)  # characters, of at most four bytes
        except OSError as error:
            self._report(AgentWarning(f"rank {self.rank}: {self._error_file} cannot be read: {error}"))
            return ""

    def _on_lines(self, stream: str, lines: list[str]) -> None:
        self._tail.extend(lines)
        self._report(RankLog(self.rank, stream, tuple(lines)))
