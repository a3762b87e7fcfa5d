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
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.holdings import Holdings, start_zero_copy_thread
from support.polling import block_until

MARK = "ZSPMD_TEST_MARK"
DEADLINE_S = 5.0


class LeakCheck:
    """A context manager: ``check`` asserts that what was started inside is gone within ``DEADLINE_S``.

    Attributes:
        runtime_dir: where run directories go; ``zspmd`` below it holds one for each launch.
    """

    def __enter__(self) -> LeakCheck:
        start_zero_copy_thread()
        self._before = {name: os.environ.get(name) for name in (MARK, "XDG_RUNTIME_DIR")}
        self._directory = tempfile.TemporaryDirectory(prefix="z")  # short: a socket's path has 107 bytes at most
        self.runtime_dir = Path(self._directory.name)
        self._mark = secrets.token_hex(8)
        os.environ.update({MARK: self._mark, "XDG_RUNTIME_DIR": str(self.runtime_dir)})
        self._holdings = Holdings.now()
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
        """Assert that no process and no run directory is left, and that this process holds nothing that it did not hold before."""
        self.wait_gone()
        self._holdings.check()


@pytest.fixture
async def leak_check() -> AsyncIterator[LeakCheck]:
    """Hand out a ``LeakCheck`` and check it at the end; async, so that the loop's own descriptors are there before and after."""
    with LeakCheck() as check:
        yield check
        check.check()
