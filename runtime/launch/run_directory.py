"""The directory of a launch: private to the user, and held by exactly one launch at a time.

ZeroMQ's ``ipc://`` has no collision detection: binding over a live socket steals its traffic. So sockets live in a directory with
mode 0700 that is named by the launch id and locked by ``flock`` for as long as the driver, its agent or the agent's guard lives.

The lock file lies in the directory and goes with it, so whoever locks it looks again whether the path still leads to that file:

    create:  mkdir -> open(lock) -> flock -> same inode? -> ours (clean what a dead launch left)
               ^________ENOENT________|         | no
               ^________________________________|
    remove:  unlink all but the lock -> unlink the lock -> rmdir -> close (the lock ends here)

Driver, agent and guard (until there is an agent: driver and guard) would have to be killed together for the directory to stay. The
next launch, whatever its id, removes it: a directory is dead when its lock can be taken, or it has none and is empty.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path

from ...descriptors import receive_fds
from ...errors import ConfigError, EndpointInUseError, LaunchError, ResourceError
from .launch_id import check_launch_id
from .resources import launch_error

LOCK_NAME = "lock"
# sun_path has 108 bytes, the last of them zero.
MAX_SOCKET_PATH_BYTES = 107
_MAX_PATH_BYTES = 4096
_LONGEST_NAME_BYTES = 24
_ROOM_FOR_ENDPOINT_BYTES = 16
# Whoever looks whether a directory is dead holds its lock for a moment.
_LOCK_RETRY_S = 0.25
_LOCK_RETRY_PERIOD_S = 0.005


class RunDirectory:
    """A locked directory for the sockets of one launch.

    ``lock_fd`` holds the lock; a child that inherits it keeps the lock beyond the death of its parent.
    """

    def __init__(self, path: Path, lock_fd: int) -> None:
        """Take over a directory whose lock the caller holds in ``lock_fd``; ``create`` makes a new one."""
        self.path = path
        self.lock_fd = lock_fd

    @classmethod
    def create(cls, launch_id: str, node_rank: int = 0) -> RunDirectory:
        """Make and lock the directory of a launch, or take over the one that a dead launch of the same id left.

        What other dead launches of this user have left goes too. A node beside the driver's has one of its own, for which the two
        may share a file system.

        Raises:
            ConfigError: the launch id cannot be used, or the path is too long for a socket.
            EndpointInUseError: a live launch has the same id; the message names its pid.
            ResourceError: the disk is full or read-only; nothing is left there.
            LaunchError: the parent directory is not private to this user.
        """
        path = run_directory_path(launch_id, node_rank)
        _check_socket_path(path / ("x" * _ROOM_FOR_ENDPOINT_BYTES))
        _make_private(path.parent)
        remove_dead_directories()
        while True:
            _make_private(path)
            lock_fd = _lock(path, launch_id)
            if lock_fd is not None:
                return cls(path, lock_fd)._prepared()

    def endpoint(self, name: str) -> str:
        """Return the ``ipc://`` endpoint of a socket in this directory.

        Raises:
            ConfigError: the socket's path exceeds 107 bytes.
        """
        _check_socket_path(self.path / name)
        return f"ipc://{self.path / name}"

    def hand_over(self, channel: socket.socket) -> None:
        """Leave path and lock as one message in a packet socket: the lock is held as long as anybody has the other end.

        Raises:
            OSError: the other end is closed, or no room.
        """
        socket.send_fds(channel, [os.fsencode(self.path)], [self.lock_fd])

    @classmethod
    def handed_over(cls, channel: socket.socket) -> RunDirectory | None:
        """Return the directory that ``hand_over`` has left at the other end, None where there is none; others may take it too."""
        try:
            path, fds = receive_fds(channel, _MAX_PATH_BYTES, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        return cls(Path(os.fsdecode(path)), fds[0]) if fds else None

    def let_go(self) -> None:
        """Leave the directory to those that it was handed over to."""
        os.close(self.lock_fd)
        self.lock_fd = -1

    def remove(self) -> None:
        """Remove the directory, unless a later launch has it, and give the lock back; does nothing the second time."""
        if self.lock_fd < 0:
            return
        if _is_same_file(self.path / LOCK_NAME, self.lock_fd):
            self._clean()
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            try:
                self.path.rmdir()
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:  # not empty: the next launch has made its lock there already
                    raise
        os.close(self.lock_fd)
        self.lock_fd = -1

    def _prepared(self) -> RunDirectory:
        """Remove what a dead launch left and write who holds the lock; on an error nothing stays."""
        try:
            self._clean()
            os.ftruncate(self.lock_fd, 0)
            os.pwrite(self.lock_fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.remove()
            raise launch_error(f"cannot use the run directory {self.path}", error) from error
        return self

    def _clean(self) -> None:
        for entry in list(os.scandir(self.path)):
            if entry.name == LOCK_NAME:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                Path(entry.path).unlink(missing_ok=True)


def run_directory_path(launch_id: str, node_rank: int = 0) -> Path:
    """Return where the directory of a launch lies, without making it.

    It is in ``$XDG_RUNTIME_DIR/zspmd`` when that variable names a directory of this user's, else in ``zspmd-<uid>`` in the temporary
    directory: ``su`` and ``sudo`` may leave the variable as it was, and what root made there would shut its owner out.

    Raises:
        ConfigError: the launch id cannot be used.
        ResourceError: there is no temporary directory that can be written.
    """
    name = check_launch_id(launch_id) + (f"@{node_rank}" if node_rank else "")  # no launch id has the character
    if len(name) > _LONGEST_NAME_BYTES:
        # A dot in front: no launch id begins with one, so that no id can be another's hash.
        name = "." + hashlib.sha256(name.encode()).hexdigest()[: _LONGEST_NAME_BYTES - 1]
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime and _is_own_directory(runtime):
        return Path(os.path.abspath(runtime)) / "zspmd" / name
    try:
        return Path(tempfile.gettempdir()) / f"zspmd-{os.getuid()}" / name
    except FileNotFoundError as error:
        raise ResourceError(f"{error.strerror}: each is missing, full or read-only; set XDG_RUNTIME_DIR to one with room") from error


def _is_own_directory(path: str) -> bool:
    try:
        facts = os.stat(path)
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()


def remove_dead_directories() -> list[str]:
    """Remove the directories of launches that are dead, and return their names."""
    parent = run_directory_path("any").parent
    removed = []
    for entry in list(os.scandir(parent)) if parent.is_dir() else []:
        path = Path(entry.path)
        if not entry.is_dir(follow_symlinks=False):
            continue
        lock_fd = _take_dead_lock(path)
        if lock_fd is not None:
            RunDirectory(path, lock_fd).remove()
        if lock_fd is not None or _is_removed_empty(path):
            removed.append(entry.name)
    return removed


def _is_removed_empty(path: Path) -> bool:
    """Remove a directory whose maker ended before its lock; whoever is just making it finds it gone and makes it again."""
    try:
        path.rmdir()
    except OSError:  # in use, or gone already
        return False
    return True


def _take_dead_lock(path: Path) -> int | None:
    """Return the lock of a directory that nobody holds; None where somebody does or it is just being made or removed."""
    try:
        lock_fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock_fd)
        return None
    if not _is_same_file(path / LOCK_NAME, lock_fd):
        os.close(lock_fd)
        return None
    return lock_fd


def _make_private(path: Path) -> None:
    """Make the directory, or check that the one that is there is nobody else's."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        facts = path.lstat()
    except FileNotFoundError as error:
        if path.parent.is_dir():  # removed between the two calls by its last owner
            return
        raise LaunchError(f"{path.parent} does not exist; create it or set XDG_RUNTIME_DIR or TMPDIR to a directory") from error
    except OSError as error:
        raise launch_error(f"cannot make the run directory {path}", error) from error
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise LaunchError(
            f"{path} is not a directory with mode 0700 of uid {os.getuid()} (mode {stat.filemode(facts.st_mode)}, uid {facts.st_uid}); "
            "remove it, or set XDG_RUNTIME_DIR to a private directory"
        )


def _lock(path: Path, launch_id: str) -> int | None:
    """Return a locked descriptor, or None when the directory was removed under us and is to be made again."""
    try:
        lock_fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
    except OSError as error:
        with contextlib.suppress(OSError):  # not empty: somebody else's lock is in it
            path.rmdir()
        raise launch_error(f"cannot lock the run directory {path}", error) from error
    try:
        _wait_locked(lock_fd)
    except BlockingIOError as error:
        holder = _holder(lock_fd)
        os.close(lock_fd)
        who = f"pid {holder}" if holder else "a process that is just starting"
        raise EndpointInUseError(f"launch id {launch_id!r} is held by {who}; end that launch or choose another id") from error
    if not _is_same_file(path / LOCK_NAME, lock_fd):
        os.close(lock_fd)
        return None
    return lock_fd


def _wait_locked(lock_fd: int) -> None:
    """Take the lock; raises BlockingIOError where a live process holds it, or anybody for more than ``_LOCK_RETRY_S``."""
    deadline = time.monotonic() + _LOCK_RETRY_S
    while True:
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            holder = _holder(lock_fd)
            if (holder.isdigit() and os.path.exists(f"/proc/{holder}")) or time.monotonic() > deadline:
                raise
        time.sleep(_LOCK_RETRY_PERIOD_S)


def _holder(lock_fd: int) -> str:
    return os.pread(lock_fd, 32, 0).decode(errors="replace").strip()


def _is_same_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _check_socket_path(path: Path) -> None:
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"socket path {path} has {size} bytes where {MAX_SOCKET_PATH_BYTES} are possible; "
            "set XDG_RUNTIME_DIR or TMPDIR to a shorter path"
        )
