"""How processes of one machine find their driver without being told: a private file in a run directory.

The driver makes it with a secret of its own when it listens; the others look for it until a deadline. The directory is its user's alone,
and goes with the driver, however that ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from ....errors import LaunchError
from ..run_directory import run_directory_path

# Of the run directory, which no node has: that of the launch itself is made later.
DIRECTORY_NUMBER = 1 << 16
_NAME = "dial"
_MAX_BYTES = 4096
_PERIOD_S = 0.02


@dataclass(frozen=True)
class DialFile:
    """Where the driver listens, and the secret to call it by. ``pid`` and ``started`` tell a driver that has ended from one that lives."""

    secret: str
    address: str
    port: int
    pid: int
    started: str

    @classmethod
    def create(cls, address: str, port: int, secret: str) -> DialFile:
        """Return the file of this process."""
        return cls(secret, address, port, os.getpid(), _start_time(os.getpid()))

    def write(self, directory: Path) -> None:
        """Write it whole or not at all; raises OSError."""
        new = directory / f"{_NAME}.new"
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump(asdict(self), file)
        new.rename(directory / _NAME)


def make_secret() -> str:
    """Return a new random secret."""
    return secrets.token_hex(32)


async def wait_dial_file(launch_id: str, timeout_s: float) -> DialFile:
    """Return the file of a launch as soon as a driver that lives has made it.

    Raises:
        LaunchError: none within ``timeout_s``.
    """
    directory = run_directory_path(launch_id, DIRECTORY_NUMBER)
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        found = _read(directory / _NAME)
        if found is not None and _start_time(found.pid) == found.started:
            return found
        if asyncio.get_running_loop().time() > deadline:
            raise LaunchError(
                f"the driver of launch {launch_id} did not listen within {timeout_s:g} s: it makes {directory / _NAME}; the process of "
                "rank or node 0 may have ended, or be in another container (give all of them one ZSPMD_SECRET, then, and --master-addr)"
            )
        await asyncio.sleep(_PERIOD_S)


def _read(path: Path) -> DialFile | None:
    """Return what the file says; None where there is none, or it is not this user's alone."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(_MAX_BYTES)
    except OSError:
        return None
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) != 0o600:
        return None
    return DialFile(**json.loads(content))


def _start_time(pid: int) -> str:
    """Return when a process began, in the kernel's ticks; nothing for one that is gone. With the pid it names a process for good."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return ""
