"""The two ways in which an agent starts a rank: executing a program, or asking the zygote for a fork."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping

import msgpack

from ... import process
from ...errors import InternalError, LaunchError, describe_exit
from .agent_protocol import RankStart, Start

_DEFAULT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ)
_MAX_REPLY_BYTES = 128 << 10
_ZYGOTE_END_S = 1.0
_POLL_S = 0.005


def spawn_rank(start: Start, rank: RankStart, stdout_fd: int, stderr_fd: int, stacks_fd: int) -> int:
    """Execute the launch's program as one rank, in a session of its own; return its pid. The caller closes the descriptors.

    Raises:
        OSError: no process could be made. A program that cannot be executed is an exit code (126 or 127) and a line on stderr.
    """
    environment = _with_paths(rank.environment, start)
    bootstrap_fd = bootstrap_file(rank.bootstrap)
    try:
        if bootstrap_fd is not None:
            os.set_inheritable(bootstrap_fd, True)  # this process has one thread: nothing else is executed meanwhile
            environment[process.BOOTSTRAP_FD] = str(bootstrap_fd)
        os.set_inheritable(stacks_fd, True)
        environment[process.STACKS_FD] = str(stacks_fd)
        argv = [sys.executable, "-I", "-S", process.__file__, str(os.getpid()), start.cwd, *start.argv]
        return _execute(argv, environment, stdout_fd, stderr_fd)
    finally:
        if bootstrap_fd is not None:
            os.close(bootstrap_fd)


def bootstrap_file(data: bytes) -> int | None:
    """Return a descriptor, not inheritable, of a file in memory that holds ``data``; None for no data."""
    if not data:
        return None
    fd = os.memfd_create("zspmd-bootstrap", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


class Zygote:
    """The agent's handle on ``zspmd.workers.zygote``: a process that has imported much and forks ranks at once.

    A request is a file in memory, sent with the rank's descriptors over a socket pair; so neither the environment's size nor its
    content matters to the channel. The forks become children of the agent, its subreaper.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._socket: socket.socket | None = None
        self.pid = 0

    async def open(self) -> None:
        """Start the process and wait until it has imported the launch's preload modules.

        Raises:
            LaunchError: an import failed (with its traceback), started a thread, or the process ended.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.set_inheritable(True)
            argv = [sys.executable, "-m", "zspmd.workers.zygote", str(theirs.fileno()), str(os.getpid())]
            # OpenBLAS starts its threads when NumPy is imported, and a process with threads cannot be forked safely.
            environment = {**_with_paths(self._start.ranks[0].environment, self._start), "OPENBLAS_NUM_THREADS": "1"}
            self._socket = ours
            ours.setblocking(False)
            self.pid = _execute(argv, environment, 1, 2)
        await self._ask({"preload": list(self._start.preload), "sys_path": list(self._start.sys_path)}, [])

    async def fork_rank(self, rank: RankStart, stdout_fd: int, stderr_fd: int, stacks_fd: int) -> int:
        """Return the pid of a new rank that has its own session and dies with the agent.

        Raises:
            LaunchError: it could not be forked, or the zygote ended.
        """
        request = {"environment": rank.environment, "cwd": self._start.cwd, "entry": self._start.entry}
        bootstrap_fd = bootstrap_file(rank.bootstrap)
        try:
            reply = await self._ask(request, [stdout_fd, stderr_fd, stacks_fd] + ([] if bootstrap_fd is None else [bootstrap_fd]))
        finally:
            if bootstrap_fd is not None:
                os.close(bootstrap_fd)
        pid = reply.get("pid")
        if not isinstance(pid, int):
            raise InternalError(f"the zygote answered {reply!r:.200} to a request for a fork")
        return pid

    def kill(self) -> None:
        """End the process; it is reaped as any orphan is. The ranks that it forked are not its children and live on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.pid = 0

    async def _ask(self, request: Mapping[str, object], fds: list[int]) -> dict[str, object]:
        assert self._socket is not None, "the zygote is closed"
        request_fd = bootstrap_file(msgpack.packb(request, unicode_errors="surrogateescape"))
        assert request_fd is not None, "a request is never empty"
        try:
            socket.send_fds(self._socket, [b"?"], [request_fd, *fds])
            data = await asyncio.get_running_loop().sock_recv(self._socket, _MAX_REPLY_BYTES)
        except (BrokenPipeError, ConnectionResetError):
            data = b""
        finally:
            os.close(request_fd)
        if not data:
            code = await self._wait_ended()
            raise LaunchError(f"the process that was to fork the ranks {describe_exit(code)}; its last words are on the agent's stderr")
        reply: dict[str, object] = msgpack.unpackb(data)
        if "error" in reply:
            raise LaunchError(str(reply["error"]))
        return reply

    async def _wait_ended(self) -> int:
        """Return the exit code of the process, which has closed its socket and so is ending."""
        deadline = time.monotonic() + _ZYGOTE_END_S
        while (code := self._reap()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            await asyncio.sleep(_POLL_S)
        return code

    def _reap(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        self.pid = 0
        return os.waitstatus_to_exitcode(status)


def _with_paths(environment: Mapping[str, str], start: Start) -> dict[str, str]:
    """Return the environment in which a program finds the driver's modules, whatever its directory."""
    paths = [path for path in (*start.sys_path, environment.get("PYTHONPATH", "")) if path]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)} if start.sys_path else dict(environment)


def _execute(argv: list[str], environment: dict[str, str], stdout_fd: int, stderr_fd: int) -> int:
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, stdout_fd, 1),
        (os.POSIX_SPAWN_DUP2, stderr_fd, 2),
    ]
    return os.posix_spawn(argv[0], argv, environment, file_actions=actions, setsid=True, setsigmask=[], setsigdef=_DEFAULT_SIGNALS)
