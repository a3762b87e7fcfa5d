"""Where the output of each launch is kept when nobody says where: ``$XDG_STATE_HOME/zspmd/<launch id>``, and ``latest`` beside it.

The launcher holds a lock on ``launcher.log``, its own lines, for as long as it lives, so that no other launch takes or removes its
directory. The directories of the newest launches are kept, those of older ones go when the next begins.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ..launch_id import check_launch_id

NUM_KEPT = 20
LATEST = "latest"
_LOG_NAME = "launcher.log"


class LogDirectory:
    """The directory of one launch, held until ``close``; ``open_log_directory`` makes it."""

    def __init__(self, path: Path, log_fd: int) -> None:
        self.path = path
        self._log_fd = log_fd

    @property
    def launcher_log(self) -> str:
        """The file for the launcher's own lines."""
        return str(self.path / _LOG_NAME)

    def close(self) -> None:
        """Let go of it; what is in it stays."""
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1


class LauncherLog:
    """A file of the launcher's own lines; a disk that takes no more is told once, and ends nothing."""

    def __init__(self, path: str | None, on_trouble: Callable[[str], None]) -> None:
        self._path = path
        self._on_trouble = on_trouble

    def write(self, text: str) -> None:
        """Append a line, or several."""
        if self._path is None:
            return
        path = self._path
        try:
            with open(path, "a", errors="replace") as file:
                file.write(f"{text}\n")
        except OSError as error:
            self._path = None
            self._on_trouble(f"{path} takes no more: {error.strerror}; the launch goes on")


def state_path() -> Path:
    """Return where the directories of this user's launches are, without making it."""
    state = os.environ.get("XDG_STATE_HOME", "")
    return Path(state if os.path.isabs(state) else os.path.expanduser("~/.local/state")) / "zspmd"


def log_path(launch_id: str) -> Path:
    """Return the directory of a launch; raises ConfigError for an id that no launch can have."""
    check_launch_id(launch_id)
    return state_path() / (f"{LATEST}_" if launch_id == LATEST else launch_id)


def open_log_directory(launch_id: str) -> LogDirectory | None:
    """Make the directory of a launch, empty, and let go of those of old ones; None where a live launch of this id has it.

    Raises:
        OSError: it cannot be made: a full or read-only disk, no home.
    """
    path = log_path(launch_id)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    log_fd = _take_lock(path)
    if log_fd is None:
        return None
    try:
        _clean(path)
        _point_latest(path)
        remove_old_directories(path.parent)
    except OSError:
        os.close(log_fd)
        raise
    return LogDirectory(path, log_fd)


def remove_old_directories(state: Path, num_kept: int = NUM_KEPT) -> list[str]:
    """Remove the directories of launches that have ended, but those of the newest; return their names."""
    found = [entry for entry in os.scandir(state) if entry.is_dir(follow_symlinks=False)]
    found.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime_ns, reverse=True)
    removed = []
    for entry in found[num_kept:]:
        log_fd = _take_lock(Path(entry.path), must_exist=True)
        if log_fd is not None:
            shutil.rmtree(entry.path, ignore_errors=True)  # what cannot be removed now is tried again by the next launch
            os.close(log_fd)
            removed.append(entry.name)
    return removed


def _take_lock(path: Path, *, must_exist: bool = False) -> int | None:
    """Return the locked log of a directory; None where a live launch has it, or none has ever been there."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if must_exist else os.O_CREAT)
    try:
        log_fd = os.open(path / _LOG_NAME, flags, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(log_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(log_fd)
        return None
    return log_fd


def _clean(path: Path) -> None:
    """Remove what an earlier launch of this id has left."""
    os.truncate(path / _LOG_NAME, 0)
    for entry in list(os.scandir(path)):
        if entry.name != _LOG_NAME and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)
    os.utime(path)


def _point_latest(path: Path) -> None:
    new = path.parent / f".{LATEST}-{secrets.token_hex(4)}"
    new.symlink_to(path.name)
    try:
        new.replace(path.parent / LATEST)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise
