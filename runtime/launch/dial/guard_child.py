"""The guard and agent that a node's process starts for a driver elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from ....errors import describe_exit
from ..resources import launch_error
from .dial_keys import SECRET_VARIABLE

_END_S = 15.0
_KILLED_S = 3.0


class GuardChild:
    """``guard --stdio`` as a child of this process, in a session of its own; it ends when ``stream`` does. ``open`` first.

    ``on_end`` is called once with how it ended, in words.
    """

    def __init__(self, on_end: Callable[[str], None]) -> None:
        self._on_end = on_end
        self._ended = asyncio.Event()

    def open(self) -> socket.socket:
        """Start it; return the socket with its byte stream, which is the caller's.

        Raises:
            ResourceError, LaunchError: it cannot be started.
        """
        self._loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-u", "-m", "zspmd.runtime.launch.guard", "--stdio"],
                    stdin=theirs.fileno(),
                    stdout=theirs.fileno(),
                    start_new_session=True,
                    cwd="/",  # no file of the user's there can be taken for a module
                    env=_environment(),
                )
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError as error:
                ours.close()
                raise launch_error("the agent of this node cannot be started", error) from error
        self._loop.add_reader(self._pidfd, self._reap)
        return ours

    async def wait_ended(self) -> None:
        """Wait for its end, after its stream was closed; kill it, and the agent with it, when it takes too long."""
        for limit_s in (_END_S, _KILLED_S):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), limit_s)
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _reap(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = self._process.wait()
        self._ended.set()
        self._on_end(f"its agent {describe_exit(code)}")


def _environment() -> dict[str, str]:
    """Return this process's environment, without the secret, in which the modules are found that it has found itself."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    environment.pop(SECRET_VARIABLE, None)
    return environment
