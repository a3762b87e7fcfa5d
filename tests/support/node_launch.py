"""The test's end of a driver program on the first host of a ``Cluster``, such as ``node_driver``."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.cluster import Cluster

DEADLINE_S = 30.0
TESTS = Path(__file__).parents[1]


class NodeLaunch:
    """A context manager: starts the program, and kills it where it has not ended by the end of the block.

    Args:
        cluster: its first host is the driver's.
        program: a module.
        hosts: entries as in a hostfile, or the path of one; ``slots`` of the first hosts otherwise.
        rsh: the command that reaches other hosts.
        lease_s: one for tests is short.
        nodes: further fields of ``NodesConfig``, and ``deadlines`` of ``Deadlines``.
        env: variables of the program on top of this process's.
        options: whatever else the program understands.

    Attributes:
        events: all that it has told so far; ``errors`` is what it said on its standard error, once it was finished.
    """

    def __init__(
        self,
        cluster: Cluster,
        rsh: str,
        *,
        program: str = "support.node_driver",
        slots: Sequence[int] = (2, 1, 1),
        hosts: Sequence[str] | str | None = None,
        lease_s: float = 3.0,
        nodes: Mapping[str, Any] | None = None,
        deadlines: Mapping[str, float] | None = None,
        env: Mapping[str, str | None] | None = None,
        cwd: str | None = None,
        **options: Any,
    ) -> None:
        self.events: list[dict[str, Any]] = []
        entries = cluster.hostfile(slots).splitlines() if hosts is None else hosts
        self._options: dict[str, Any] = {
            "hosts": entries,
            "world_size": sum(slots),
            "worker_args": {},
            "log_dir": None,
            "nodes": {"rsh": rsh, **(nodes or {})},
            "deadlines": {"lease_s": lease_s, **(deadlines or {})},
            **options,
        }
        self._cluster = cluster
        self._program = program
        self._env: dict[str, str | None] = {"PYTHONPATH": str(TESTS), **(env or {})}
        self._cwd = cwd
        self._rest = b""
        self.errors = ""

    def __enter__(self) -> NodeLaunch:
        argv = [sys.executable, "-m", self._program, json.dumps(self._options)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = self._cluster.run(0, argv, env=self._env, cwd=self._cwd, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(DEADLINE_S)

    @property
    def pid(self) -> int:
        """The driver's."""
        return self._process.pid

    def order(self, name: str, *arguments: Any) -> None:
        """Have the driver do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        self._process.stdin.flush()

    def wait(self, event: str, timeout_s: float = DEADLINE_S, **fields: Any) -> dict[str, Any]:
        """Return what the driver tells next of a kind, with these fields; fails with all that it said if it does not."""
        deadline = time.monotonic() + timeout_s
        while (found := self._next(deadline)) is not None:
            if found["event"] == event and fields.items() <= found.items():
                return found
        raise AssertionError(f"no {event!r} {fields} within {timeout_s:g} s; last: {self.events[-8:]}; {self._read_errors()}")

    def finish(self, timeout_s: float = DEADLINE_S) -> list[dict[str, Any]]:
        """Wait for the end of the program, and return all that it told."""
        deadline = time.monotonic() + timeout_s
        while self._next(deadline) is not None:
            pass
        self._process.wait(max(0.1, deadline - time.monotonic()))
        self.errors = self._read_errors()
        return self.events

    def told(self, event: str) -> list[dict[str, Any]]:
        """Return what the driver has told so far of a kind."""
        return [found for found in self.events if found["event"] == event]

    def _next(self, deadline: float) -> dict[str, Any] | None:
        """Return the next event; None at the deadline, and at the end of the output."""
        stdout = self._process.stdout
        assert stdout is not None
        while b"\n" not in self._rest:
            readable, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(stdout.fileno(), 1 << 16) if readable else b""
            if not data:
                return None
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        self.events.append(event)
        return event

    def _read_errors(self) -> str:
        """Return what the program said on its standard error, up to its end."""
        self._process.kill()
        assert self._process.stderr is not None
        return str(self._process.stderr.read().decode())[-4000:]
