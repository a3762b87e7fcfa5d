"""What ties a process of a launch to its parent and its children. Linux, standard library only.

It is also a program, which the agent puts before a rank that it does not fork itself::

    python -I -S process.py PARENT_PID CWD PROGRAM [ARGS...]

binds the process to its parent's life and then becomes PROGRAM. Python's ``preexec_fn`` could do the same, but runs between fork
and exec, where one lock held by another thread is a deadlock.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
BOOTSTRAP_FD = "ZSPMD_BOOTSTRAP_FD"
STACKS_FD = "ZSPMD_STACKS_FD"
# Has a rank write its stacks for the agent. A real-time one, which no library uses by default; people have SIGUSR1.
STACKS_SIGNAL = signal.SIGRTMIN + 11
STACKS_READY = b"ready\n"
CONNECTION_LOST = 111  # how a rank ends whose connection to the driver broke
CANNOT_EXECUTE = 126
NOT_FOUND = 127
_SWEEP_PERIOD_S = 0.005


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel send SIGKILL to this process when ``parent_pid`` ends; survives ``exec``.

    The kernel acts when the parent's *thread* that started this process ends, so start children from a thread that lives on.
    A parent that was gone before the call is found by ``getppid``, and this process ends in the same way.

    Raises:
        OSError: the kernel refused.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def become_subreaper() -> None:
    """Make this process the parent of every orphan among its descendants, whatever session it has moved to.

    Raises:
        OSError: the kernel refused.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def child_pids() -> set[int]:
    """Return the pids of this process's own and adopted children, zombies included.

    Raises:
        OSError: /proc does not tell.
    """
    pids: set[int] = set()
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children") as children:
                pids.update(int(pid) for pid in children.read().split())
        except (FileNotFoundError, ProcessLookupError):
            if int(task) == os.getpid():  # any other thread may have ended meanwhile, and its children are another's by then
                raise
    return pids


def has_children() -> bool:
    """Say whether any child is left, zombies included; unlike ``child_pids`` it cannot miss one that is just being adopted."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def end_children(timeout_s: float) -> set[int]:
    """Kill and reap every child, own or adopted, until there is none; return the pids of those that had not ended in time.

    A subreaper has the children of what it kills as its own, so that a whole tree ends, whatever sessions it has moved to.
    """
    deadline = time.monotonic() + timeout_s
    while has_children() and time.monotonic() < deadline:
        for pid in child_pids():
            end_child(pid)
        time.sleep(_SWEEP_PERIOD_S)
    return child_pids() if has_children() else set()


def end_child(pid: int) -> None:
    """Kill a child and reap it if it has ended by now; one that runs as another user (``sudo``) cannot be killed and stays."""
    with contextlib.suppress(PermissionError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, os.WNOHANG)


def name_process(name: str) -> None:
    """Set what top and ``ps -e`` show of this process, at most 15 bytes; it would go by its parent's name else."""
    with open("/proc/self/comm", "w") as file:
        file.write(name)


def take_bootstrap() -> bytes:
    """Return the secret bytes that the launcher handed to this rank, once; empty where it handed over none.

    They come through an inherited file descriptor whose number is in ``ZSPMD_BOOTSTRAP_FD``. Descriptor and variable are gone
    afterwards, so that no child of the rank finds them.
    """
    number = os.environ.pop(BOOTSTRAP_FD, None)
    if number is None:
        return b""
    with open(int(number), "rb") as bootstrap:
        return bootstrap.read()


def offer_stacks() -> None:
    """Have this process's Python stacks written for its agent whenever the agent asks, also while a C call holds the GIL.

    They go to a file in memory that the agent shares; its descriptor's number is in ``ZSPMD_STACKS_FD``, which is gone
    afterwards. A process that no agent started has no such variable and offers nothing.
    """
    number = os.environ.pop(STACKS_FD, None)
    if number is None:
        return
    fd = int(number)
    os.set_inheritable(fd, False)
    faulthandler.register(STACKS_SIGNAL, file=fd, all_threads=True, chain=False)
    os.write(fd, STACKS_READY)


def reset_signals() -> None:
    """Give every signal that Python or a parent may have ignored its default action, for a program that is to be executed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {value}): {os.strerror(code)}")


def _execute(parent_pid: int, cwd: str, argv: list[str]) -> int:
    die_with_parent(parent_pid)
    reset_signals()
    try:
        os.chdir(cwd)
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"zspmd: cannot execute {argv[0]!r} in {cwd!r}: {error}", file=sys.stderr)
        return NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_EXECUTE


if __name__ == "__main__":
    sys.exit(_execute(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
