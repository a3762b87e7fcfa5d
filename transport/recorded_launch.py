"""What the recording of a launch says: how it was started, what was published, what was answered, and how it failed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..config import Deadlines, ParallelConfig
from ..errors import BadFrameError, ConfigError, RecordingError
from .codec import decode_value
from .frames import StepKind
from .recording import Entry, EntryFile, EntryKind
from .records import MAX_RANK, MAX_RECORD_BYTES, MAX_SEQ
from .schema import Record, many, number, read_record, text, whole


class RecordingRecord(Record, max_bytes=MAX_RECORD_BYTES):
    """Base of the records in recordings."""


@dataclass(frozen=True)
class RecordedLaunch(RecordingRecord):
    """The first entry: everything that fresh ranks need to know, bar the worker's arguments, which follow as a value."""

    zspmd_version: str = text(64)
    launch_id: str = text(64)
    epoch: int = whole((1 << 32) - 1)
    worker: str = text(1024)
    main_path: str = text(4096)
    cwd: str = text(4096)
    sys_path: tuple[str, ...] = many(str, 4096)
    preload: tuple[str, ...] = many(str, 4096)
    start_method: str = text(16)
    tp: int = whole(MAX_RANK + 1, 1)
    pp: int = whole(MAX_RANK + 1, 1)
    dp: int = whole(MAX_RANK + 1, 1)
    ep: int = whole(MAX_RANK + 1, 1)
    output_ranks: tuple[int, ...] = many(int, MAX_RANK + 1)
    devices: tuple[str, ...] = many(str, MAX_RANK + 1)
    communicator: str = text(64)
    window: int = whole(1 << 16, 1)
    omp_num_threads: str = text(64)
    beat_s: float = number()
    ready_s: float = number()
    step_s: float = number()
    collective_s: float = number()
    drain_s: float = number()
    kill_s: float = number()
    lease_s: float = number(default=15.0)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(tp=self.tp, pp=self.pp, dp=self.dp, ep=self.ep)

    @property
    def deadlines(self) -> Deadlines:
        return Deadlines(**{name: getattr(self, name) for name in Deadlines.__dataclass_fields__})


@dataclass(frozen=True)
class RecordedRank(RecordingRecord):
    """The first entry of a rank's own file, which holds what its collectives returned."""

    epoch: int = whole((1 << 32) - 1)
    rank: int = whole(MAX_RANK)


@dataclass(frozen=True)
class RecordedFault(RecordingRecord):
    """The first cause of a launch's end; ``rank`` is -1 where none is to blame, ``step_id`` -1 before the first step.

    ``message`` is what the error says apart from pids, log lines and consequences, which no two runs have in common.
    """

    error: str = text(128)
    rank: int = whole(MAX_RANK, -1)
    step_id: int = whole(MAX_SEQ, -1)
    message: str = text(65_536)

    def __str__(self) -> str:
        where = "" if self.rank < 0 else f" of rank {self.rank}"
        when = "" if self.step_id < 0 else f" in step {self.step_id}"
        return f"{self.error}{where}{when}: {self.message}"


def rank_path(path: str, rank: int) -> str:
    """Return the file, beside the recording of a launch, with one rank's collectives."""
    return f"{path}.r{rank:05d}"


def read_recorded(entry: Entry) -> RecordingRecord:
    """Return the record that an entry holds; raises RecordingError."""
    try:
        return read_record(RecordingRecord, entry.body)
    except BadFrameError as error:
        raise RecordingError(f"the record at offset {entry.offset} cannot be read: {error}") from error


def read_value(entry: Entry) -> Any:
    """Return the value that an entry holds; raises RecordingError."""
    try:
        return decode_value(entry.body, entry.buffers)
    except BadFrameError as error:
        raise RecordingError(f"the value at offset {entry.offset} cannot be read: {error}") from error


def read_call(entry: Entry) -> tuple[str, list[Any], dict[str, Any], list[int]]:
    """Return method, args, kwargs and ranks of a recorded call; raises RecordingError."""
    value = read_value(entry)
    wanted = (str, list, dict, list)
    if not isinstance(value, list) or len(value) != len(wanted) or any(type(v) is not w for v, w in zip(value, wanted)):
        raise RecordingError(f"the call at offset {entry.offset} is not [method, args, kwargs, ranks]; record again, or restore the file")
    method, args, kwargs, ranks = value
    return method, args, kwargs, ranks


class Recording:
    """A launch's recording, read and checked as a whole.

    Attributes:
        launch: how it was started.
        fault: why it ended before its driver closed it, if so.
        notes: what a reader should know of the file: that it is not complete, or of another version of zspmd.
        num_frames: steps and calls.
    """

    def __init__(self, path: str, file: EntryFile) -> None:
        self.path = path
        self._file = file
        entries = iter(file)
        first = next(entries, None)
        launch = read_recorded(first) if first is not None and first.kind is EntryKind.LAUNCH else None
        if not isinstance(launch, RecordedLaunch):
            raise RecordingError(f"{path} does not begin with a launch; give the file that launch(record=...) was told, not one of a rank")
        try:
            launch.parallel, launch.deadlines  # noqa: B018  # they check themselves
        except ConfigError as error:
            raise RecordingError(f"{path} holds a launch that cannot be: {error}") from error
        self.launch = launch
        self.fault: RecordedFault | None = None
        self._arguments: int | None = None
        self._frames: list[int] = []
        self._answers: dict[tuple[int, int], int] = {}
        for entry in entries:
            self._index(entry)
        self.notes = [file.note] if file.note else []
        if launch.zspmd_version != __version__:
            self.notes.append(f"recorded by zspmd {launch.zspmd_version}, replayed by {__version__}")

    @classmethod
    def open(cls, path: str) -> Recording:
        """Read the file once and check all of it.

        Raises:
            RecordingError: no recording of a launch, of another version, or damaged. One that is cut at its end is none: see ``notes``.
        """
        return cls(path, EntryFile.open(path))

    @property
    def num_frames(self) -> int:
        return len(self._frames)

    def worker_args(self) -> dict[str, Any]:
        """Return the keyword arguments of the worker's ``setup``."""
        if self._arguments is None:
            raise RecordingError(f"{self.path} ends before the worker's arguments; record again")
        value = read_value(self._file.entry(self._arguments))
        if not isinstance(value, dict):
            raise RecordingError(f"{self.path} has a {type(value).__name__} where the worker's arguments are due")
        return value

    def frames(self) -> Iterator[Entry]:
        """Yield the steps and calls in the order of their publication."""
        return map(self._file.entry, self._frames)

    def frame(self, seq: int) -> Entry:
        """Return the step or call with this number on the step socket, from 1."""
        return self._file.entry(self._frames[seq - 1])

    def answer(self, rank: int, seq: int) -> Entry | None:
        """Return what a rank answered to a frame."""
        offset = self._answers.get((rank, seq))
        return None if offset is None else self._file.entry(offset)

    def answers(self) -> Iterator[tuple[int, int]]:
        """Yield (rank, seq) of every recorded answer, in the order of their arrival."""
        return iter(self._answers)

    def _index(self, entry: Entry) -> None:
        if entry.kind is EntryKind.FRAME:
            if entry.seq != len(self._frames) + 1:  # 0 is the SYNC, which is not recorded
                raise RecordingError(f"{self.path} has frame {entry.seq} at offset {entry.offset} where {len(self._frames) + 1} is due")
            if entry.code not in (StepKind.STEP, StepKind.CALL):
                raise RecordingError(
                    f"{self.path} has a frame of kind {entry.code} at offset {entry.offset}; only steps and calls are recorded"
                )
            self._frames.append(entry.offset)
        elif entry.kind is EntryKind.ANSWER:
            self._answers[entry.rank, entry.seq] = entry.offset
        elif entry.kind is EntryKind.ARGUMENTS:
            self._arguments = entry.offset
        elif entry.kind is EntryKind.FAULT:
            fault = read_recorded(entry)
            if not isinstance(fault, RecordedFault):
                raise RecordingError(f"{self.path} has a {type(fault).__name__} at offset {entry.offset} where a fault is due")
            self.fault = fault
        elif entry.kind is not EntryKind.END:
            raise RecordingError(f"{self.path} has a {entry.kind.name} entry at offset {entry.offset}, which the file of no launch has")
