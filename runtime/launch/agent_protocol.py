"""What driver and agent tell each other: typed records, each behind its length.

driver -> agent   Start (once), Hold, Release, Signal, DumpStacks, Stop
agent -> driver   AgentStarted (first), RankStarted, RankLog, RankExited, RankStack, StacksDone, AgentWarning, LaunchFailed,
                  AgentGone, GuardGone or DriverLost (last)

what only passes between nodes is in ``node_records``

on the wire: u32 little-endian length, then the record as ``transport.schema`` packs it. From another node a line of text comes first,
``guard.GREETING``, since a login may print whatever it likes before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ...errors import BadFrameError
from ...transport.schema import Record, blob, flag, many, mapping, number, pack_record, read_record, text, whole

_LENGTH = struct.Struct("<I")
MAX_RECORD_BYTES = 32 << 20
MAX_RANKS = 1 << 16
START_METHODS = ("fork", "spawn")
LOG_POLICIES = ("drop", "wait")
STREAMS = ("out", "err")
MAX_ERROR_REPORT_BYTES = 1 << 20
MAX_STACK_CHARACTERS = 64 << 10
_MAX_TEXT = 1 << 20
_MAX_ITEMS = 1 << 16
_MAX_ARGUMENTS = 1 << 20  # more than the kernel takes
_MAX_PID = 1 << 22
_MAX_SECONDS = 1e6
_MAX_REQUEST = (1 << 53) - 1
_MAX_NS = (1 << 63) - 1


class AgentRecord(Record, max_bytes=MAX_RECORD_BYTES):
    """Base of what passes between driver and agent."""


@dataclass(frozen=True)
class RankStart(AgentRecord):
    """One rank to start: its whole environment, and secret bytes that it alone can read (``process.take_bootstrap``)."""

    rank: int = whole(MAX_RANKS - 1)
    environment: dict[str, str] = mapping()
    bootstrap: bytes = blob(MAX_RECORD_BYTES, default=b"")


@dataclass(frozen=True)
class RelayOrder(AgentRecord):
    """Take each step from the driver's ``upstream`` endpoint by these keys, and publish it again at ``endpoint``, within the node."""

    upstream: str = text(_MAX_TEXT)
    endpoint: str = text(_MAX_TEXT)
    public_key: bytes = blob(40, repr=False)
    secret_key: bytes = blob(40, repr=False)
    server_key: bytes = blob(40, repr=False)


@dataclass(frozen=True)
class Start(AgentRecord):
    """All that an agent needs to know.

    Args:
        ranks: what to start, in this order.
        start_method: "spawn" executes ``argv``; "fork" calls ``entry`` in forks of a process that has imported ``preload``.
        argv: the program and its arguments ("spawn").
        preload: modules to import before the first fork; they must start no thread and touch no GPU.
        entry: "module:function" without arguments; what it returns, or SystemExit carries, is the exit code.
        cwd: working directory of the ranks.
        sys_path: the driver's ``sys.path`` ("fork"), put before PYTHONPATH ("spawn"); empty leaves the interpreter's own.
        log_dir: where to append each rank's raw output to r00003.out and .err; None for nowhere.
        log_policy: what becomes of lines when the driver does not read: "drop" counts them, "wait" has ranks wait as at any full pipe.
        kill_s: from SIGKILL until a process must be gone, where no Stop says otherwise.
        has_own_environment: whether ranks get this node's environment too, where ``RankStart`` sets no value of its own.
        relay: one, where the agent is to take each step for all ranks of its node.
    """

    ranks: tuple[RankStart, ...] = many(RankStart, MAX_RANKS)
    start_method: str = text(16, choices=START_METHODS)
    argv: tuple[str, ...] = many(str, _MAX_ARGUMENTS, default=())
    preload: tuple[str, ...] = many(str, _MAX_ITEMS, default=())
    entry: str = text(_MAX_TEXT, default="zspmd.workers.main:main")
    cwd: str = text(_MAX_TEXT, default="/")
    sys_path: tuple[str, ...] = many(str, _MAX_ITEMS, default=())
    log_dir: str | None = text(_MAX_TEXT, is_optional=True, default=None)
    log_policy: str = text(16, choices=LOG_POLICIES, default="drop")
    kill_s: float = number(0, _MAX_SECONDS, default=2.0)
    has_own_environment: bool = flag(default=False)
    relay: tuple[RelayOrder, ...] = many(RelayOrder, 1, default=())


@dataclass(frozen=True)
class Hold(AgentRecord):
    """Read no further what ranks print, until ``Release``."""


@dataclass(frozen=True)
class Release(AgentRecord):
    """Read it again."""


@dataclass(frozen=True)
class Signal(AgentRecord):
    """Send a signal to every rank that runs: SIGTERM to its process alone, others to its whole group.

    So a terminal and a manager of jobs do it: programs count on SIGINT for all of a foreground group, and may need their children
    to save what they have when they get SIGTERM.
    """

    number: int = whole(64, 1)


@dataclass(frozen=True)
class DumpStacks(AgentRecord):
    """Tell what each running rank is doing: a ``RankStack`` for each, then ``StacksDone``, with this ``request``."""

    request: int = whole(_MAX_REQUEST)


@dataclass(frozen=True)
class Stop(AgentRecord):
    """End the ranks: leave them ``grace_s`` to end by themselves, then SIGTERM, after ``kill_s`` SIGKILL.

    A later Stop can bring these moments forward, never put them off.
    """

    grace_s: float = number(0, _MAX_SECONDS)
    kill_s: float = number(0, _MAX_SECONDS)


@dataclass(frozen=True)
class AgentStarted(AgentRecord):
    """The agent serves; ``pid`` is its own, while the driver's child is the guard."""

    pid: int = whole(_MAX_PID, 1)


@dataclass(frozen=True)
class RankStarted(AgentRecord):
    """A rank's process exists."""

    rank: int = whole(MAX_RANKS - 1)
    pid: int = whole(_MAX_PID, 1)


@dataclass(frozen=True)
class RankLog(AgentRecord):
    """Whole lines that a rank printed."""

    rank: int = whole(MAX_RANKS - 1)
    stream: str = text(3, choices=STREAMS)
    lines: tuple[str, ...] = many(str, _MAX_ITEMS)


@dataclass(frozen=True)
class RankExited(AgentRecord):
    """A rank's process ended and its output is read.

    Args:
        exit_code: negative for a signal.
        log_tail: its last lines.
        error_report: what it wrote to the file that TORCHELASTIC_ERROR_FILE names, if it did.
        ended_ns: when its agent saw the end, on the monotonic clock of the agent's node; as an event, on the driver's. 0 for never.
        was_signalled: the agent had sent it a signal before. Clocks of two nodes do not tell that.
    """

    rank: int = whole(MAX_RANKS - 1)
    pid: int = whole(_MAX_PID, 1)
    exit_code: int = whole(255, -64)
    log_tail: tuple[str, ...] = many(str, _MAX_ITEMS)
    error_report: str = text(MAX_ERROR_REPORT_BYTES, default="")
    ended_ns: int = whole(_MAX_NS, default=0)
    was_signalled: bool = flag(default=False)


@dataclass(frozen=True)
class RankStack(AgentRecord):
    """What a rank was doing: a line with the kernel's word, then the Python stacks of its threads or why there are none."""

    request: int = whole(_MAX_REQUEST)
    rank: int = whole(MAX_RANKS - 1)
    text: str = text(4 * MAX_STACK_CHARACTERS)


@dataclass(frozen=True)
class StacksDone(AgentRecord):
    """Every rank that was running has had its ``RankStack``."""

    request: int = whole(_MAX_REQUEST)


@dataclass(frozen=True)
class AgentWarning(AgentRecord):
    """Something that does not end the launch, such as a full disk under the log files."""

    reason: str = text(_MAX_TEXT)


@dataclass(frozen=True)
class LaunchFailed(AgentRecord):
    """The ranks could not all be started; the agent ends those that were. ``reason`` has any traceback."""

    reason: str = text(_MAX_TEXT)


@dataclass(frozen=True)
class AgentGone(AgentRecord):
    """Nothing is left but ``left``: pids that did not end even after SIGKILL."""

    left: tuple[int, ...] = many(int, _MAX_ITEMS)


@dataclass(frozen=True)
class GuardGone(AgentRecord):
    """The agent's guard has ended before it, so the agent ends everything, and reports no more."""


@dataclass(frozen=True)
class DriverLost(AgentRecord):
    """The agent has heard nothing of its driver for the lease, so it ends everything, and reports no more. Read by one that was stopped."""

    reason: str = text(_MAX_TEXT)


def encode_record(record: AgentRecord) -> bytes:
    """Return the bytes of a record, its length in front; raises BadFrameError as ``pack_record`` does."""
    body = pack_record(record)
    return _LENGTH.pack(len(body)) + body


class RecordReader:
    """Cuts a byte stream into records."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[AgentRecord]:
        """Yield every record that is complete with ``data``.

        Raises:
            BadFrameError: a length above the limit, or what ``read_record`` raises; the stream is unusable afterwards.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_RECORD_BYTES:
                raise BadFrameError(f"a record announces {size} B; the limit is {MAX_RECORD_BYTES}")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                return
            with memoryview(self._buffer) as buffer, buffer[_LENGTH.size : end] as body:
                record = read_record(AgentRecord, body)
            del self._buffer[:end]
            yield record
