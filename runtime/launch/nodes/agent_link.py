"""The ways to an agent that this process does not start itself: through ssh, or any other command that does the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections import deque
from typing import IO, TYPE_CHECKING, Protocol

from ....config import NodesConfig
from ....errors import ConfigError, describe_exit
from ..resources import launch_error

if TYPE_CHECKING:
    from ..hosts.host import Host

_TAIL_LINES = 20
_CHUNK_BYTES = 64 << 10
_CONNECT_S = 20
# What terminals take for an order: of colour and cursor, of title, and others.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
# No terminal, which would echo what is sent and change its line ends; no questions, which nobody would answer; no side channels. A
# connection whose far end is gone ends by itself within 15 s.
_SSH_OPTIONS = ("-T", "-x", "-a", "-o", "BatchMode=yes", "-o", "ClearAllForwardings=yes", "-o", f"ConnectTimeout={_CONNECT_S}")
_SSH_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")


class AgentLink(Protocol):
    """Carries the records of one agent on another node; the agent's own word on how things end comes in them."""

    @property
    def name(self) -> str:
        """What to call it in messages, such as "ssh lee@node1"."""

    def open(self) -> tuple[int, int]:
        """Begin, on the running loop; return descriptors to read from and to write to, which are the caller's from then on.

        Raises:
            LaunchError: it cannot be begun.
        """

    @property
    def tail(self) -> list[str]:
        """The last lines that the carrier printed beside the records."""

    async def wait_ended(self, timeout_s: float) -> str | None:
        """Wait for the end of the carrier and say how it ended; None where it has not."""

    def kill(self) -> None:
        """End the carrier, which ends the agent's input; idempotent."""


class RshLink:
    """An agent that ``NodesConfig.rsh`` starts on a host. The command gets the host and one line for the shell there."""

    def __init__(self, host: Host, config: NodesConfig) -> None:
        self._argv = rsh_argv(host, config)
        self.name = f"{os.path.basename(self._argv[0])} {host.target}"
        self._process: subprocess.Popen[bytes] | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._rest = b""
        self._ended = asyncio.Event()

    @property
    def argv(self) -> tuple[str, ...]:
        """The whole command, which holds no secret."""
        return self._argv

    @property
    def tail(self) -> list[str]:
        return list(self._tail)

    def open(self) -> tuple[int, int]:
        self._loop = asyncio.get_running_loop()
        self._ended.clear()
        try:
            # A process group of its own: a terminal's Ctrl-C is for the driver, which needs its agents to end the launch in order.
            self._process = subprocess.Popen(
                self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            )
        except FileNotFoundError as error:
            raise ConfigError(f"{self._argv[0]!r} is not installed: {error}; install it, or name another command by --rsh") from error
        except OSError as error:
            raise launch_error(f"{self.name} cannot be started", error) from error
        with _pipe(self._process.stdin) as stdin, _pipe(self._process.stdout) as stdout:
            fds = os.dup(stdout.fileno()), os.dup(stdin.fileno())
        self._stderr = _pipe(self._process.stderr)
        os.set_blocking(self._stderr.fileno(), False)
        self._loop.add_reader(self._stderr, self._read_tail)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._reap)
        return fds

    async def wait_ended(self, timeout_s: float) -> str | None:
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        except asyncio.TimeoutError:
            return None
        assert self._process is not None, "open comes first"
        code = self._process.returncode
        return f"{self.name} {describe_exit(code)}" + (f": {self._tail[-1]}" if self._tail else "")

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read_tail(self) -> None:
        try:
            data = os.read(self._stderr.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._tail.extend(filter(None, map(shown_line, lines)))
        if not data or len(self._rest) > _CHUNK_BYTES:
            self._tail.extend(filter(None, [shown_line(self._rest)]))
            self._rest = b""
        if not data:
            self._loop.remove_reader(self._stderr)

    def _reap(self) -> None:
        assert self._process is not None, "its end was awaited"
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        self._read_tail()
        self._loop.remove_reader(self._stderr)
        self._stderr.close()
        self._ended.set()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "the process was started with it"
    return stream


def rsh_argv(host: Host, config: NodesConfig, command: str | None = None) -> tuple[str, ...]:
    """Return the command that runs an agent on a host, or ``command`` for the shell there."""
    words = shlex.split(config.rsh)
    port = host.port or config.ssh_port
    if os.path.basename(words[0]) == "ssh":
        words += [*_SSH_OPTIONS, *_SSH_ALIVE, *(("-p", str(port)) if port else ())]
    elif port:
        raise ConfigError(f"port {port} of {host.name} is ssh's, and the command is {config.rsh!r}; put the port into the command")
    return (*words, *config.ssh_options, host.target, agent_command(host, config) if command is None else command)


def trial_argv(host: Host, config: NodesConfig) -> tuple[str, ...]:
    """Return the command by which people try whether a host can be reached as ``rsh_argv`` does it."""
    words, port = shlex.split(config.rsh), host.port or config.ssh_port
    if os.path.basename(words[0]) == "ssh":
        words += ["-o", "BatchMode=yes", *(("-p", str(port)) if port else ())]
    return (*words, *config.ssh_options, host.target, "echo works")


def agent_command(host: Host, config: NodesConfig) -> str:
    """Return the line that starts an agent in any login shell. The directory is no user's: no file there is taken for a module."""
    python = host.python or config.python or sys.executable
    return f"exec sh -c {shlex.quote(f'cd / && exec {shlex.quote(python)} -u -m zspmd.runtime.launch.guard --stdio')}"


def shown_line(line: bytes) -> str:
    """Return a line of a login or of ssh as it may be shown on a terminal, "" for a blank one: what it would obey is left out."""
    text = _ESCAPES.sub("", line.decode(errors="replace"))
    return "".join(character for character in text if character.isprintable() or character == "\t").strip()


def is_refused_for_load(way: str) -> bool:
    """Say whether the end of an ssh client is that of one among too many at a time, which is worth another try."""
    return any(
        text in way
        for text in ("kex_exchange_identification", "Connection closed by", "Connection reset by", "ssh_exchange_identification")
    )
