"""Agents with ranks that run a few lines of Python, started by a ``NodeSupervisor`` whose events are kept."""

from __future__ import annotations

import asyncio
import os
import select
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from zspmd.runtime.launch.agent_protocol import RankLog, RankStart, Start
from zspmd.runtime.launch.run_directory import RunDirectory
from zspmd.runtime.launch.supervisor import Event, NodeSupervisor

E = TypeVar("E")
DEADLINE_S = 20.0

WAIT = "import signal; print('ready', flush=True); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True)\nwhile True: signal.pause()"
DAEMON = """
import os, signal
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print('daemon', os.getpid(), flush=True)
        signal.pause()
    os._exit(0)
os.wait()
signal.pause()
"""


class Node:
    """A supervisor whose events are kept."""

    def __init__(self, order: Start, launch_id: str | None) -> None:
        self.events: list[Event] = []
        self.order = order
        self.launch_id = launch_id
        self.supervisor = NodeSupervisor(self._on_event)
        self.directory: RunDirectory | None = None
        self._change = asyncio.Event()

    def _on_event(self, event: Event) -> None:
        self.events.append(event)
        self._change.set()

    async def start(self) -> None:
        self.supervisor.open()
        self.directory = None if self.launch_id is None else RunDirectory.create(self.launch_id)
        await self.supervisor.start(self.order, self.directory, DEADLINE_S)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    def lines(self, rank: int, stream: str = "out") -> list[str]:
        return [line for log in self.of(RankLog) if (log.rank, log.stream) == (rank, stream) for line in log.lines]

    async def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            await asyncio.wait_for(self._change.wait(), deadline - time.monotonic())
            self._change.clear()


class Nodes:
    """Starts nodes and remembers every pid that must not outlive the test."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.pidfds: dict[int, int] = {}

    def make(self, program: str, world_size: int = 1, launch_id: str | None = None, **fields: Any) -> Node:
        ranks = tuple(RankStart(rank, {**os.environ, "RANK": str(rank)}, f"secret {rank}".encode()) for rank in range(world_size))
        order: dict[str, Any] = {"start_method": "spawn", "argv": (sys.executable, "-I", "-S", "-c", program), **fields}
        node = Node(Start(ranks, **order), launch_id)
        self.nodes.append(node)
        return node

    async def started(self, program: str, world_size: int = 1, launch_id: str | None = None, **fields: Any) -> Node:
        node = self.make(program, world_size, launch_id, **fields)
        await node.start()
        return node

    def watch(self, pid: int) -> None:
        """Have the end of the test wait for the end of ``pid``, from a moment at which it lives."""
        self.pidfds[pid] = os.pidfd_open(pid)

    def check_nothing_left(self) -> None:
        for pid, pidfd in self.pidfds.items():
            assert wait_ended(pidfd, 5.0), f"process {pid} is left"
            os.close(pidfd)
        for node in self.nodes:
            pids = [node.supervisor.guard_pid, node.supervisor.agent_pid, *node.supervisor.pids.values()]
            assert [pid for pid in pids if pid is not None and is_alive(pid)] == []
            if node.directory is not None:
                node.directory.remove()
                assert not node.directory.path.exists()


def wait_ended(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def is_alive(pid: int) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        return not wait_ended(pidfd, 1.0)
    finally:
        os.close(pidfd)


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short directory: pytest's own leave no room for socket paths."""
    with tempfile.TemporaryDirectory(prefix="z") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


@pytest.fixture
def nodes(runtime_dir: Path) -> Iterator[Nodes]:
    made = Nodes()
    yield made
    made.check_nothing_left()
    assert not (runtime_dir / "zspmd").exists() or list((runtime_dir / "zspmd").iterdir()) == []
