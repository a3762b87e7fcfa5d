"""The agent of another node, as the driver has it: over a link, with a lease, and out of reach of every signal."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

from .... import __version__
from ....errors import BadFrameError, LaunchError
from ..agent_protocol import AgentRecord, AgentStarted, DriverLost, GuardGone, RecordReader
from ..guard import GREETING
from ..record_stream import RecordStream
from .agent_link import AgentLink, shown_line
from .lease import Lease, PeerClock
from .node_records import Attach, Ping, Pong

_MAX_NOISE_BYTES = 1 << 20
_MAX_GREETING_BYTES = 256
_NUM_NOISE_LINES = 10
_KILLED_S = 3.0


class GreetedReader(RecordReader):
    """A ``RecordReader`` that passes over what a login prints, up to the agent's greeting; ``noise`` has the last lines of it."""

    def __init__(self, on_greeting: Callable[[int], None]) -> None:
        super().__init__()
        self.noise: list[str] = []
        self._on_greeting = on_greeting
        self._is_greeted = False
        self._before = b""
        self._num_noise_bytes = 0

    def feed(self, data: bytes) -> Iterator[AgentRecord]:
        """As ``RecordReader.feed``; raises BadFrameError too for an agent of another version, or none in the first MiB."""
        if not self._is_greeted:
            data = self._pass_noise(data)
        if self._is_greeted:
            yield from super().feed(data)

    def _pass_noise(self, data: bytes) -> bytes:
        """Return what follows the greeting; nothing while it has not come."""
        rest = self._before + data
        while (end := rest.find(b"\n")) >= 0:
            line, rest = rest[:end], rest[end + 1 :]
            if line.startswith(GREETING):
                self._greet(line)
                return rest
            self._num_noise_bytes += len(line) + 1
            self.noise = [*self.noise, *filter(None, [shown_line(line)])][-_NUM_NOISE_LINES:]
        self._before = rest
        if self._num_noise_bytes + len(rest) > _MAX_NOISE_BYTES:
            raise BadFrameError(f"no agent among the first {_MAX_NOISE_BYTES} B; the shell there prints without end: see its start files")
        return b""

    def _greet(self, line: bytes) -> None:
        version, _, pid = line[len(GREETING) : _MAX_GREETING_BYTES].decode(errors="replace").partition(" ")
        if version != __version__:
            raise BadFrameError(f"it runs zspmd {version}, the driver {__version__}; install the same version there")
        if not pid.isdecimal():
            raise BadFrameError(f"its greeting is {line[:80]!r}, without a pid")
        self._is_greeted = True
        self._on_greeting(int(pid))


class RemoteAgent:
    """An agent behind a link, from the start of the link to its end; has what ``AgentProcess`` has.

    Beyond the link the agent and its guard end everything by themselves: when the link ends, and when they have heard nothing for the
    lease, whether or not anybody can tell them. ``on_greeted`` is called when the agent answers; nothing is sent before.
    """

    def __init__(
        self,
        link: AgentLink,
        lease_s: float,
        on_record: Callable[[AgentRecord], None],
        on_silence: Callable[[BadFrameError | None], None],
        on_end: Callable[[str], None],
        on_greeted: Callable[[], None],
    ) -> None:
        self.link = link
        self.clock = PeerClock()
        self.guard_pid: int | None = None
        self.agent_pid: int | None = None
        self._on_record = on_record
        self._on_silence = on_silence
        self._on_end = on_end
        self._on_greeted = on_greeted
        self._lease = Lease(lease_s, self.ping, self._expire)
        self._reader = GreetedReader(self._greet)
        self._stream: RecordStream | None = None
        self._num_pings = 0
        self._pinged: dict[int, int] = {}
        self._ended = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._is_told = False

    @property
    def noise(self) -> list[str]:
        """What the login there printed before the agent spoke, its last lines."""
        return self._reader.noise

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def open(self) -> None:
        """Start the link and return at once.

        Raises:
            ConfigError, LaunchError: it cannot be started; nothing is left.
        """
        read_fd, write_fd = self.link.open()
        self._stream = RecordStream(read_fd, write_fd, self._handle, self._end_stream, self._reader)
        self._stream.open()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    def send(self, record: AgentRecord) -> None:
        """Queue a record for the agent; it is dropped when the link is gone."""
        if self._stream is not None:
            self._stream.send(record)

    def disconnect(self, kill_s: float) -> None:
        """Have the agent find its driver gone, and end the link ``kill_s`` seconds later if it is there still."""
        self._close()
        asyncio.get_running_loop().call_later(kill_s, self.link.kill)

    async def wait_ended(self, timeout_s: float) -> None:
        """Wait until the link has ended; close it after ``timeout_s``, and end what carries it later.

        Raises:
            LaunchError: even that has not ended it.
        """
        for escalate, limit_s in ((None, timeout_s), (self.kill_agent, _KILLED_S), (self.kill_both, _KILLED_S)):
            if escalate is not None:
                escalate()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._ended.wait(), limit_s)
                return
        raise LaunchError(f"{self.link.name} did not end {_KILLED_S} s after SIGKILL; see its state in /proc")

    def kill_agent(self) -> None:
        """Have the agent find its driver gone, upon which it ends all that it has."""
        self._close()

    def kill_both(self) -> None:
        """End what carries the link; an agent that is there still ends by its lease."""
        self._close()
        self.link.kill()

    def _greet(self, guard_pid: int) -> None:
        self.guard_pid = guard_pid
        self.send(Attach(self._lease.lease_s))
        self._lease.start()
        self._on_greeted()

    def ping(self) -> None:
        """Ask for the agent's clock."""
        self._num_pings += 1
        self._pinged = {self._num_pings: time.monotonic_ns(), **dict(list(self._pinged.items())[:32])}
        self.send(Ping(self._num_pings))

    def _handle(self, record: AgentRecord) -> None:
        self._lease.heard()
        if isinstance(record, Pong):
            sent_ns = self._pinged.pop(record.number, None)
            if sent_ns is not None:
                self.clock.answered(sent_ns, record.monotonic_ns, time.monotonic_ns())
        elif isinstance(record, AgentStarted):
            self.agent_pid = record.pid
        elif isinstance(record, GuardGone):
            self._tell(f"the guard of its agent, pid {self.guard_pid}, is gone, so it ends all that runs there")
        elif isinstance(record, DriverLost):
            self._tell(record.reason)
        else:
            self._on_record(record)

    def _expire(self) -> None:
        """Give the node up: whatever still comes from it is of no interest any more, and it ends by itself."""
        self._tell(
            f"nothing was heard of it for {self._lease.lease_s:g} s; what runs there ends by itself once it has heard nothing for as long"
        )
        self.kill_both()

    def _end_stream(self, error: BadFrameError | None) -> None:
        self._lease.cancel()
        if error is not None:
            self._tell(str(error) if self.guard_pid is None else f"it broke the protocol: {error}")
            self._close()
        self._on_silence(None)  # the error is the reason for its end, which is told once
        asyncio.get_running_loop().call_later(_KILLED_S, self._kill_link)

    def _kill_link(self) -> None:
        """End a link that has nothing to carry any more: one that something holds open there would hide the agent's end."""
        if not self._ended.is_set():
            self.link.kill()

    async def _watch(self) -> None:
        while (way := await self.link.wait_ended(3600.0)) is None:
            pass
        if self._stream is not None:
            self._stream.drain()
        self._close()
        self._tell(way)
        self._ended.set()

    def _close(self) -> None:
        self._lease.cancel()
        if self._stream is not None:
            self._stream.close()

    def _tell(self, way: str) -> None:
        if not self._is_told:
            self._is_told = True
            self._on_end(way)
