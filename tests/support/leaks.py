"""Proof that a launch has left nothing behind.

Everything started while ``LeakCheck`` is entered inherits an environment variable, by which its processes are found again whoever
their parent is by then. Run directories lie in a directory of the test's own. A port or a socket lives in a descriptor of some
process, so with no process and no new descriptor there is none.
"""

from __future__ import annotations

import os
import secrets
import signal
import tempfile
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import zmq
from support.polling import block_until

MARK = "ZSPMD_TEST_MARK"
SHARED_MEMORY = Path("/dev/shm")
DEADLINE_S = 5.0


class LeakCheck:
    """A context manager: ``check`` asserts that what was started inside is gone within ``DEADLINE_S``.

    Attributes:
        runtime_dir: where run directories go; ``zspmd`` below it holds one for each launch.
    """

    def __enter__(self) -> LeakCheck:
        _start_zero_copy_thread()
        self._before = {name: os.environ.get(name) for name in (MARK, "XDG_RUNTIME_DIR")}
        self._directory = tempfile.TemporaryDirectory(prefix="z")  # short: a socket's path has 107 bytes at most
        self.runtime_dir = Path(self._directory.name)
        self._mark = secrets.token_hex(8)
        os.environ.update({MARK: self._mark, "XDG_RUNTIME_DIR": str(self.runtime_dir)})
        self._fds, self._threads, self._shared_memory = _open_fds(), set(threading.enumerate()), _shared_memory()
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        self._directory.cleanup()

    def processes(self) -> dict[int, str]:
        """Return pid and command line of every process that was started inside."""
        wanted = f"{MARK}={self._mark}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                except OSError:  # it ended meanwhile, or is somebody else's
                    continue
        return found

    def run_directories(self) -> list[str]:
        """Return the run directories that are there."""
        parent = self.runtime_dir / "zspmd"
        return sorted(entry.name for entry in parent.iterdir()) if parent.exists() else []

    def wait_gone(self, timeout_s: float = DEADLINE_S) -> None:
        """Wait until no process and no run directory is left; raises TimeoutError."""
        try:
            block_until(lambda: not self.processes() and not self.run_directories(), timeout_s)
        except TimeoutError:
            raise TimeoutError(f"left after {timeout_s:g} s: {self.processes()} {self.run_directories()}") from None

    def check(self) -> None:
        """Assert that there is no process, run directory, descriptor, thread or shared memory that was not there before."""
        self.wait_gone()
        assert _zombies() == []
        assert {fd: target for fd, target in _open_fds().items() if self._fds.get(fd) != target} == {}
        assert set(threading.enumerate()) - self._threads == set()
        assert _shared_memory() - self._shared_memory == set()


@pytest.fixture
async def leak_check() -> AsyncIterator[LeakCheck]:
    """Hand out a ``LeakCheck`` and check it at the end; async, so that the loop's own descriptors are there before and after."""
    with LeakCheck() as check:
        yield check
        check.check()


def _open_fds() -> dict[int, str]:
    """Return where each descriptor of this process leads."""
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the listing itself
            continue
    return fds


def _shared_memory() -> set[str]:
    return {entry.name for entry in SHARED_MEMORY.iterdir() if "zspmd" in entry.name} if SHARED_MEMORY.is_dir() else set()


def _zombies() -> list[int]:
    """Return children of this process that ended and were not waited for."""
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return []
    return [] if ended is None else [ended.si_pid]


def _start_zero_copy_thread() -> None:
    """Have pyzmq start the thread by which it frees large buffers; it starts once a process and stays."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as left, context.socket(zmq.PAIR) as right:
        left.bind("inproc://warm")
        right.connect("inproc://warm")
        left.send(bytes(1 << 17), copy=False)
        right.recv()
