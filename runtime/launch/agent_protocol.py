"""What driver and agent tell each other: typed records, each a length and a msgpack map.

    driver -> agent   Start (first, once), Stop, Kill, SignalRank
    agent -> driver   RankStarted, RankLog, RankExited, AgentWarning, LaunchFailed, AgentGone (last)

    record on the wire: u32 little-endian length of the body, body = {"kind": ..., one entry per field}

A field name has the same type and bounds in every record, so one table checks them all.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields

import msgpack

from ...errors import BadFrameError

_LENGTH = struct.Struct("<I")
MAX_RECORD_BYTES = 32 << 20
MAX_RANKS = 1 << 16
_MAX_TEXT = 1 << 20
_MAX_PID = 1 << 22
_MAX_SECONDS = 1e6


@dataclass(frozen=True)
class RankStart:
    """One rank to start: its whole environment, and secret bytes that it alone can read (``process.take_bootstrap``)."""

    rank: int
    environment: dict[str, str]
    bootstrap: bytes = b""


@dataclass(frozen=True)
class Start:
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
        kill_s: from SIGKILL until a process must be gone, where no Stop says otherwise.
        run_directory, lock_fd: the directory to remove at the end, and its inherited lock; None and -1 for none.
        driver_pid: a process whose end is the driver's end, beside the end of the stream; 0 for none (a remote driver).
    """

    ranks: tuple[RankStart, ...]
    start_method: str
    argv: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    entry: str = "zspmd.workers.main:main"
    cwd: str = "/"
    sys_path: tuple[str, ...] = ()
    log_dir: str | None = None
    kill_s: float = 2.0
    run_directory: str | None = None
    lock_fd: int = -1
    driver_pid: int = 0


@dataclass(frozen=True)
class Stop:
    """End the ranks: leave them ``grace_s`` to end by themselves, then SIGTERM, after ``kill_s`` SIGKILL.

    A later Stop can bring these moments forward, never put them off.
    """

    grace_s: float
    kill_s: float


@dataclass(frozen=True)
class Kill:
    """SIGKILL everything now."""


@dataclass(frozen=True)
class SignalRank:
    """Send one signal to the process of one rank, not to its children."""

    rank: int
    signal: int


@dataclass(frozen=True)
class RankStarted:
    """A rank's process exists."""

    rank: int
    pid: int


@dataclass(frozen=True)
class RankLog:
    """Whole lines that a rank printed; ``stream`` is "out" or "err"."""

    rank: int
    stream: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class RankExited:
    """A rank's process ended and its output is read: ``exit_code`` is negative for a signal, ``log_tail`` its last lines."""

    rank: int
    pid: int
    exit_code: int
    log_tail: tuple[str, ...]


@dataclass(frozen=True)
class AgentWarning:
    """Something that does not end the launch, such as a full disk under the log files."""

    text: str


@dataclass(frozen=True)
class LaunchFailed:
    """The ranks could not all be started; the agent ends those that were. ``text`` has the reason and any traceback."""

    text: str


@dataclass(frozen=True)
class AgentGone:
    """Nothing is left but ``left``: pids that did not end even after SIGKILL."""

    left: tuple[int, ...]


Order = Start | Stop | Kill | SignalRank
Report = RankStarted | RankLog | RankExited | AgentWarning | LaunchFailed | AgentGone
Record = Order | Report
_KINDS: dict[str, type] = {
    kind.__name__: kind for kind in (Start, Stop, Kill, SignalRank, RankStarted, RankLog, RankExited, AgentWarning, LaunchFailed, AgentGone)
}


def encode_record(record: Record) -> bytes:
    """Return the bytes of a record, its length in front.

    Raises:
        BadFrameError: it is larger than the other side would take.
    """
    body: bytes = msgpack.packb({"kind": type(record).__name__, **asdict(record)}, unicode_errors="surrogateescape")
    if len(body) > MAX_RECORD_BYTES:
        raise BadFrameError(f"a {type(record).__name__} record has {len(body)} B; the limit is {MAX_RECORD_BYTES}")
    return _LENGTH.pack(len(body)) + body


def decode_record(body: bytes) -> Record:
    """Read the body of a record.

    Raises:
        BadFrameError: not a map, an unknown kind, a missing or foreign field, or a value out of its bounds.
    """
    try:
        values = msgpack.unpackb(body, unicode_errors="surrogateescape", max_ext_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadFrameError(f"a record of {len(body)} B is not msgpack: {error}") from error
    if not isinstance(values, dict):
        raise BadFrameError(f"a record is a {type(values).__name__}, not a map")
    kind = _KINDS.get(str(values.pop("kind", None)))
    if kind is None:
        raise BadFrameError(f"a record is of none of the kinds {', '.join(_KINDS)}")
    record: Record = _build(kind, values)
    return record


class RecordReader:
    """Cuts a byte stream into records."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Record]:
        """Yield every record that is complete with ``data``.

        Raises:
            BadFrameError: a length above the limit, or what ``decode_record`` raises; the stream is unusable afterwards.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_RECORD_BYTES:
                raise BadFrameError(f"a record announces {size} B; the limit is {MAX_RECORD_BYTES}")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield decode_record(body)


def _build(kind: type, values: dict[str, object]) -> Record:
    names = {field.name for field in fields(kind)}
    if set(values) != names:
        raise BadFrameError(f"a {kind.__name__} record has the fields {sorted(map(str, values))}, not {sorted(names)}")
    record: Record = kind(**{name: _CHECKS[name](f"{kind.__name__}.{name}", value) for name, value in values.items()})
    return record


def _number(low: int, high: int) -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadFrameError(f"{name} is {value!r:.80}, not a whole number from {low} to {high}")
        return value

    return check


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MAX_SECONDS:
        raise BadFrameError(f"{name} is {value!r:.80}, not a number of seconds from 0 to {_MAX_SECONDS:.0f}")
    return float(value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise BadFrameError(f"{name} is a {type(value).__name__}, not a text of at most {_MAX_TEXT} characters")
    return value


def _optional_text(name: str, value: object) -> str | None:
    return None if value is None else _text(name, value)


def _one_of(*choices: str) -> Callable[[str, object], str]:
    def check(name: str, value: object) -> str:
        if value not in choices:
            raise BadFrameError(f"{name} is {value!r:.80}, not one of {', '.join(choices)}")
        return str(value)

    return check


def _items(name: str, value: object) -> list[object]:
    if not isinstance(value, (list, tuple)) or len(value) > MAX_RANKS:
        raise BadFrameError(f"{name} is a {type(value).__name__}, not a list of at most {MAX_RANKS} entries")
    return list(value)


def _texts(name: str, value: object) -> tuple[str, ...]:
    return tuple(_text(name, item) for item in _items(name, value))


def _pids(name: str, value: object) -> tuple[int, ...]:
    return tuple(_number(1, _MAX_PID)(name, item) for item in _items(name, value))


def _environment(name: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise BadFrameError(f"{name} is a {type(value).__name__}, not a map of texts")
    return {_text(name, key): _text(name, item) for key, item in value.items()}


def _bytes(name: str, value: object) -> bytes:
    if not isinstance(value, bytes):
        raise BadFrameError(f"{name} is a {type(value).__name__}, not bytes")
    return value


def _rank_starts(name: str, value: object) -> tuple[RankStart, ...]:
    starts = []
    for item in _items(name, value):
        if not isinstance(item, dict):
            raise BadFrameError(f"{name} has an entry that is a {type(item).__name__}, not a map")
        starts.append(_build(RankStart, item))
    return tuple(starts)  # type: ignore[arg-type]  # _build returns the kind that it is given


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "rank": _number(0, MAX_RANKS - 1),
    "pid": _number(1, _MAX_PID),
    "driver_pid": _number(0, _MAX_PID),
    "signal": _number(1, 64),
    "exit_code": _number(-64, 255),
    "lock_fd": _number(-1, 1 << 20),
    "grace_s": _seconds,
    "kill_s": _seconds,
    "text": _text,
    "cwd": _text,
    "entry": _text,
    "log_dir": _optional_text,
    "run_directory": _optional_text,
    "stream": _one_of("out", "err"),
    "start_method": _one_of("fork", "spawn"),
    "lines": _texts,
    "log_tail": _texts,
    "argv": _texts,
    "preload": _texts,
    "sys_path": _texts,
    "left": _pids,
    "environment": _environment,
    "bootstrap": _bytes,
    "ranks": _rank_starts,
}
