"""What a launch takes of the system: asked for before anything is started, and named where it runs out later all the same.

It is asked for first since libzmq ends the whole process where it gets no descriptor or no thread of its own (an assertion in its
own code, which no caller can catch), and since a launch that fails half-way costs more than one that does not begin.

Nothing is changed to make room: limits are those of the user's process, and stay as they are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator

from ...errors import ConfigError, LaunchError, ResourceError
from ...process import child_pids

# Measured: the driver opens 16 + 5 a rank, and one more for each other thread of a rank that uses the store; the agent 11 + 4 a rank,
# 2 more with log files; a rank 19, 31 over TCP, and what its process groups and the program itself take.
FILES_OF_A_LAUNCH = 64
FILES_OF_A_RANK = 8
# Of libzmq and pyzmq in the driver: 2 for the sockets, 3 for large arrays that are sent from where they lie, 1 for authentication.
_NUM_THREADS = 6
_PROBE_S = 10.0

KERNEL_ADVICE = "needs Linux 5.4 or newer, a container whose seccomp lets these through, and Python 3.10 or newer built on such a system"

_ADVICE = {
    errno.EMFILE: "this process may open no more files: raise `ulimit -n`, or close some",
    errno.ENFILE: "this machine may open no more files: raise /proc/sys/fs/file-max, or end what holds them",
    errno.EAGAIN: "no process or thread more may be started: raise `ulimit -u` or the pids limit of the container",
    errno.ENOMEM: "there is no memory left: end other programs, or raise the limit of the container",
    errno.ENOSPC: "the disk is full or has no room for another file: free some, or use another one (XDG_RUNTIME_DIR, TMPDIR, log_dir)",
    errno.EDQUOT: "this user's disk quota is used up: free some, or use another disk (XDG_RUNTIME_DIR, TMPDIR, log_dir)",
    errno.EROFS: "the disk is read-only: use another one (XDG_RUNTIME_DIR, TMPDIR, log_dir)",
}


def num_files_needed(world_size: int) -> int:
    """Return how many descriptors each process of a launch may need beside those that it had before, for ranks of one node."""
    return FILES_OF_A_LAUNCH + FILES_OF_A_RANK * world_size


def missing_facilities() -> list[str]:
    """Return what the supervision of ranks needs of the kernel and is not there, each with the reason."""
    probes: tuple[tuple[str, Callable[[], None]], ...] = (
        ("pidfd_open", lambda: os.close(os.pidfd_open(os.getpid()))),
        ("pidfd_send_signal", _send_nothing),
        ("memfd_create", lambda: os.close(os.memfd_create("zspmd-probe"))),
        ("/proc of this PID namespace", _look_at_proc),
    )
    missing = []
    for name, probe in probes:
        try:
            probe()
        except (OSError, AttributeError) as error:  # a Python built for older systems lacks the function
            if not isinstance(error, OSError) or not _advice(error):
                missing.append(f"{name}: {error}")
    return missing


def check_resources(world_size: int) -> None:
    """Make sure that the kernel has what a launch needs, and descriptors, threads and a current directory for it; takes about 1 ms.

    The driver is looked at, which has most of them open already. Agent and ranks inherit its limits and begin with none open.

    Raises:
        ResourceError: too few descriptors or threads; names how many there are and what to do.
        LaunchError: the kernel or the container refuses what is needed.
        ConfigError: the current directory was removed.
    """
    if missing := missing_facilities():
        raise LaunchError(f"ranks cannot be supervised here: {'; '.join(missing)}: {KERNEL_ADVICE}")
    _check_files(num_files_needed(world_size), world_size)
    _check_threads()
    _check_directory()


def launch_error(what: str, error: Exception) -> LaunchError:
    """Return what to raise for ``error``: a ResourceError with advice where the system has run out of something.

    Args:
        what: could not be done: "the agent cannot be started".
        error: an OSError or a ZMQError, which has an errno too.
    """
    advice = _advice(error)
    return ResourceError(f"{what}: {error}; {advice}") if advice else LaunchError(f"{what}: {error}")


@contextlib.contextmanager
def shortages_named() -> Iterator[None]:
    """Turn an error of the system that says that it has run out of something into a ResourceError; others pass."""
    try:
        yield
    except Exception as error:
        if not _advice(error):
            raise
        raise launch_error("the launch cannot be started", error) from error


def _advice(error: Exception) -> str:
    """Return what to do about a shortage; empty for what is none.

    ZMQError is known by its errno, not by its class: agent and guard, for which a launch waits, never import zmq. Its EAGAIN is a
    socket that would have to wait.
    """
    number = getattr(error, "errno", None)
    return "" if number == errno.EAGAIN and not isinstance(error, OSError) else _ADVICE.get(number or 0, "")


def _send_nothing() -> None:
    pidfd = os.pidfd_open(os.getpid())
    try:
        signal.pidfd_send_signal(pidfd, 0)  # asks whether one could be sent
    finally:
        os.close(pidfd)


def _look_at_proc() -> None:
    """Raise OSError where /proc does not tell of our children, or calls them by other numbers than we do."""
    child_pids()
    number = os.readlink("/proc/self")
    if number != str(os.getpid()):
        raise OSError(f"it calls this process {number}, which calls itself {os.getpid()}; mount it anew (unshare --mount-proc)")


def _check_files(needed: int, world_size: int) -> None:
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    num_open = _num_open_below(limit)
    if limit - num_open < needed:
        wanted = num_open + needed
        is_allowed = highest == resource.RLIM_INFINITY or wanted <= highest
        advice = f"ulimit -n {wanted}" if is_allowed else f"have the hard limit, {highest}, raised, then ulimit -n {wanted}"
        raise ResourceError(
            f"this process may open {limit} files and has {num_open} open; a launch of {world_size} "
            f"{'rank' if world_size == 1 else 'ranks'} needs {needed} more: {advice}, or start fewer ranks"
        )


def _num_open_below(limit: int) -> int:
    """Return how many descriptors below the limit are taken: it bounds their numbers, and one may be above by inheritance."""
    try:
        names = os.listdir("/proc/self/fd")
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return limit
    return sum(int(name) < limit for name in names) - 1  # that of the listing itself is closed again


def _check_threads() -> None:
    """Start as many threads as libzmq will: one that it cannot start is the end of the process."""
    release = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(_NUM_THREADS):
            thread = threading.Thread(target=release.wait, args=(_PROBE_S,), name="zspmd-probe", daemon=True)
            thread.start()
            threads.append(thread)
    except (RuntimeError, MemoryError) as error:
        raise ResourceError(
            f"of {_NUM_THREADS} threads that a launch needs, this process may start {len(threads)} ({error}): raise `ulimit -u` "
            "(or -v, where that is set), or the pids limit of the container"
        ) from error
    finally:
        release.set()
        for thread in threads:
            thread.join()


def _check_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current directory was removed; change to one that is there: ranks start in it") from error
