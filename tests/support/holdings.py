"""What this process holds of the system, and the proof that a test has given back all that it took.

A look costs well under a millisecond, so that ``conftest.py`` can take one around every test. A port or a socket, abstract ones too,
is a descriptor here; its address is looked up only for the message.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zmq
from support.polling import block_until

from zspmd.runtime.launch.run_directory import run_directory_path

SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 2.0
_ZMQ_THREADS = "ZMQbg/"
_SOCKET_TABLES = ("unix", "tcp", "tcp6", "udp", "udp6")


@dataclass(frozen=True)
class Holdings:
    """One look at this process; each entry is what a leak of it would be called.

    Attributes:
        fds: where each descriptor leads.
        threads: by their native ids. Of libraries' threads only ZeroMQ's count, which a context that is never ended leaves running:
            the pools of torch and others stay.
        children: processes, ended ones that nobody has waited for too.
        names: shared memory, and run directories with the sockets in them.
    """

    fds: frozenset[tuple[int, str]]
    threads: frozenset[int]
    children: frozenset[int]
    names: frozenset[str]

    @classmethod
    def now(cls) -> Holdings:
        """Return what there is."""
        return cls(frozenset(_fds()), frozenset(_threads()), frozenset(_children()), frozenset(_names()))

    def taken_since(self, *, but_descriptors: bool = False) -> list[str]:
        """Return what there is now and was not then, in words."""
        now = Holdings.now()
        fds = set() if but_descriptors else now.fds - self.fds
        return [
            *(f"descriptor {fd} -> {_address(target)}" for fd, target in sorted(fds)),
            *(f"thread {name} ({native_id})" for native_id, name in _thread_names(now.threads - self.threads)),
            *(f"child {_describe_child(pid)}" for pid in sorted(now.children - self.children)),
            *sorted(now.names - self.names),
        ]

    def check(self, grace_s: float = GRACE_S, *, but_descriptors: bool = False) -> None:
        """Assert that all that was taken since is given back; what is on its way out has ``grace_s`` for it."""
        if self.taken_since(but_descriptors=but_descriptors):
            gc.collect()  # an error that was caught holds its frames in a cycle
            try:
                block_until(lambda: not self.taken_since(but_descriptors=but_descriptors), grace_s)
            except TimeoutError:
                left = self.taken_since(but_descriptors=but_descriptors)
                raise AssertionError("left behind: " + "; ".join(left)) from None


async def check_tasks(before: set[asyncio.Task[object]], grace_s: float = GRACE_S) -> None:
    """Assert that no task of this loop is there that was not there before; those on their way out have ``grace_s`` for it."""
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=grace_s)
    assert not left, "left behind: " + "; ".join(f"task {task.get_name()} in {task.get_coro()}" for task in left)


def start_zero_copy_thread() -> None:
    """Have pyzmq start the thread by which it frees large buffers; it starts once a process and stays."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as left, context.socket(zmq.PAIR) as right:
        left.bind("inproc://warm")
        right.connect("inproc://warm")
        left.send(bytes(1 << 17), copy=False)
        right.recv()


def _fds() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc/self/fd"):
        try:
            yield int(name), os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # that of the listing itself
            continue


def _threads() -> Iterator[int]:
    return map(int, os.listdir("/proc/self/task"))


def _thread_names(native_ids: Iterable[int]) -> Iterator[tuple[int, str]]:
    """Yield those of Python and ZeroMQ, which names its own a moment after their start."""
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    for native_id in sorted(native_ids):
        try:
            name = known.get(native_id) or Path(f"/proc/self/task/{native_id}/comm").read_text().strip()
        except OSError:  # it ended meanwhile
            continue
        if native_id in known or name.startswith(_ZMQ_THREADS):
            yield native_id, name


def _children() -> Iterator[int]:
    for native_id in os.listdir("/proc/self/task"):
        try:
            yield from map(int, Path(f"/proc/self/task/{native_id}/children").read_text().split())
        except OSError:  # the thread ended meanwhile
            continue


def _names() -> Iterator[str]:
    if SHARED_MEMORY.is_dir():
        yield from (f"{SHARED_MEMORY}/{name}" for name in os.listdir(SHARED_MEMORY) if "zspmd" in name)
    directories = run_directory_path("any").parent
    if directories.is_dir():
        yield from (f"run directory {directories / name}" for name in os.listdir(directories))


def _address(target: str) -> str:
    """Return ``target`` with the address of the socket that it is, where the kernel tells it."""
    inode = target.removeprefix("socket:[").removesuffix("]")
    if inode == target:
        return target
    for table in _SOCKET_TABLES:
        for line in Path(f"/proc/net/{table}").read_text().splitlines():
            if inode in line.split():
                return f"{target} ({table} {line.strip()})"
    return target


def _describe_child(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return f"{pid}"
    return f"{pid} (state {state}) {command}"
