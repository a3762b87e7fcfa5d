"""A side that is measured in a process of its own: it takes a turn when it is told to, and ends with its parent.

The side is told a turn as one line of JSON on standard input, and answers each by one line on standard output; its first line says that it
is ready, and the end of standard input is its end (``side_server`` is the other half). It has a session of its own, so that Ctrl-C reaches
it by way of its parent alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from ....errors import LaunchError

_START_S = 120.0
_TURN_S = 120.0
_END_S = 20.0
_KILL_S = 15.0  # longer than its keeper takes
_KEEPER = "zspmd.runtime.programs.bench.sides.keeper"
_MAX_LINE_BYTES = 1 << 24
_TAIL_BYTES = 2000


class SideProcess:
    """A side in a process of its own; enter it with ``async with``.

    Args:
        name: of the side, for messages.
        argv: of the program, which this interpreter runs: a file and its arguments, or -m and a module.
        variables: to set in its environment.
    """

    def __init__(self, name: str, argv: Sequence[str], *, variables: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        self._argv = argv
        self._variables = variables or {}

    async def __aenter__(self) -> SideProcess:
        """Start it and wait until it is ready.

        Raises:
            LaunchError: it ended, or took too long; with the tail of what it wrote to standard error.
        """
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed in _end
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                _KEEPER,
                str(os.getpid()),
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, **self._variables},
                limit=_MAX_LINE_BYTES,
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise LaunchError(f"{self.name} cannot be started: {error}") from error
        try:
            self.facts = await self._answer(_START_S, "was not ready")
        except BaseException:
            await self._end(_END_S / 4)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._end(_END_S if error is None else _END_S / 4)

    async def turn(self, request: Mapping[str, Any], *, timeout_s: float = _TURN_S) -> dict[str, Any]:
        """Have it take a turn and return its answer.

        Raises:
            LaunchError: it ended instead, or did not answer in time.
        """
        with contextlib.suppress(ConnectionError):  # its end, which reading tells better
            self._stdin.write(json.dumps(request).encode() + b"\n")
            await self._stdin.drain()
        return await self._answer(timeout_s, "did not answer")

    @property
    def _stdin(self) -> asyncio.StreamWriter:
        stdin = self._process.stdin
        if stdin is None:
            raise LaunchError(f"{self.name} has no standard input")
        return stdin

    async def _answer(self, timeout_s: float, what: str) -> dict[str, Any]:
        stdout = self._process.stdout
        if stdout is None:
            raise LaunchError(f"{self.name} has no standard output")
        try:
            line = await asyncio.wait_for(stdout.readline(), timeout_s)
        except asyncio.TimeoutError:
            raise LaunchError(f"{self.name} {what} within {timeout_s:g} s{self._tail()}") from None
        if not line:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), 1.0)
            raise LaunchError(f"{self.name} ended with exit code {self._process.returncode}{self._tail()}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise LaunchError(f"{self.name} answered {line[:80]!r}, which is no line of JSON{self._tail()}") from error
        return answer

    def _tail(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _TAIL_BYTES))
        text = self._errors.read().decode(errors="replace").strip()
        return f"; it wrote: {text}" if text else "; it wrote nothing"

    async def _end(self, grace_s: float) -> None:
        """End it by the end of its input, then by force, with all that it has started: its keeper sees to that."""
        try:
            with contextlib.suppress(OSError):
                self._stdin.close()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace_s)
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                if self._process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        self._process.send_signal(number)
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._process.wait(), _KILL_S)
            self._errors.close()
