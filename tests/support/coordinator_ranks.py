"""Real rank processes with a coordinator each, which do what a test tells them; a hub of the driver serves those of a zspmd launch."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq
from support.coordinator_rank import from_json, to_json

from zspmd.process import BOOTSTRAP_FD
from zspmd.runtime.driver.control import ControlHub
from zspmd.runtime.launch.ports import ReservedPort, reserve_port
from zspmd.runtime.launch.rank_starting import bootstrap_file
from zspmd.transport.control_sockets import ControlServer
from zspmd.transport.records import Bootstrap
from zspmd.transport.schema import pack_record

PROGRAM = str(Path(__file__).with_name("coordinator_rank.py"))
TOKEN = b"token"
LAUNCH_ID = "test-coordinators"
ANSWER_S = 90.0  # until when a rank must have answered; the first answer includes its start


class Hub:
    """The control socket of a launch, served by a thread; a context manager."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self.errors: list[Exception] = []

    def __enter__(self) -> Hub:
        self._directory = tempfile.TemporaryDirectory(prefix="z")
        self.bootstrap = pack_record(Bootstrap(launch_id=LAUNCH_ID, control_endpoint=self._endpoint(), token=TOKEN))
        self._thread.start()
        assert self._ready.wait(10.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()
        self._loop.close()
        self._directory.cleanup()
        assert self.errors == []

    def _endpoint(self) -> str:
        return f"ipc://{self._directory.name}/control"

    async def _serve(self) -> None:
        self._stopped = asyncio.Event()
        with zmq.Context() as context:
            hub = ControlHub(
                ControlServer(context, [self._endpoint()]),
                token=TOKEN,
                world_size=self._world_size,
                on_hello=lambda _: None,
                on_progress=lambda _: None,
                on_error=self.errors.append,
            )
            self._ready.set()
            await self._stopped.wait()
            hub.close()


class CoordinatorRanks:
    """``world_size`` rank processes on nodes of ``local_world_size``; a context manager.

    Attributes:
        kind: "store" as in a zspmd launch, or "torch" as under another launcher.
        processes: one for each rank.
    """

    def __init__(self, kind: str, world_size: int, local_world_size: int) -> None:
        self.kind, self.world_size, self.local_world_size = kind, world_size, local_world_size
        self.processes: list[subprocess.Popen[bytes]] = []
        self._hub = Hub(world_size) if kind == "store" else None
        self._heard = [b""] * world_size

    def __enter__(self) -> CoordinatorRanks:
        self._port: ReservedPort = reserve_port(f"{LAUNCH_ID}{os.getpid()}", "master")
        if self._hub:
            self._hub.__enter__()
        for rank in range(self.world_size):
            self.processes.append(self._start(rank))
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes):  # rank 0, which may serve torch's store, last
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if self._hub:
            self._hub.__exit__()
        self._port.close()

    @property
    def master_port(self) -> int:
        return self._port.port

    def all(self, operation: str, *arguments: Any, **options: Any) -> list[Any]:
        """Have every rank do an operation and return what each answers: its result, or an error as a dict."""
        return self.some(range(self.world_size), operation, *arguments, **options)

    def some(self, ranks: Sequence[int], operation: str, *arguments: Any, **options: Any) -> list[Any]:
        """As ``all``, for some ranks."""
        for rank in ranks:
            self.tell(rank, operation, *arguments, **options)
        return [self.hear(rank) for rank in ranks]

    def tell(self, rank: int, operation: str, *arguments: Any, **options: Any) -> None:
        """Send a rank what it is to do next."""
        pipe = self.processes[rank].stdin
        assert pipe is not None
        pipe.write(json.dumps([operation, arguments, options], default=to_json).encode() + b"\n")
        pipe.flush()

    def hear(self, rank: int, timeout_s: float = ANSWER_S) -> Any:
        """Return a rank's next answer; raises TimeoutError, or EOFError if it has ended."""
        pipe = self.processes[rank].stdout
        assert pipe is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._heard[rank]:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"rank {rank} has not answered within {timeout_s:g} s")
            if not (data := os.read(pipe.fileno(), 1 << 20)):
                raise EOFError(f"rank {rank} has ended: {self.processes[rank].wait(5.0)}")
            self._heard[rank] += data
        line, _, self._heard[rank] = self._heard[rank].partition(b"\n")
        answer = json.loads(line, object_hook=from_json)
        return answer.get("result", answer)

    def kill(self, rank: int) -> None:
        """End a rank with SIGKILL."""
        self.processes[rank].kill()
        self.processes[rank].wait()

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(rank % self.local_world_size),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.master_port),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        fd = bootstrap_file(self._hub.bootstrap) if self._hub else None
        if fd is not None:
            environment[BOOTSTRAP_FD] = str(fd)
        try:
            return subprocess.Popen(
                [sys.executable, PROGRAM],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=() if fd is None else (fd,),
            )
        finally:
            if fd is not None:
                os.close(fd)
