"""Where a traced process keeps what it did: the last so many records, in memory that another process may read at any moment.

    head, 64 B   magic | capacity u64 | records ever written u64 | closed u64 | bytes of names u64 | names that had no room u64
    names        each length u16 | UTF-8; the first is number 0; up to 64 KiB from the start
    records      48 B each, number n at place n mod capacity:
                 kind u8 | thread u8 | name u16 | detail u32 | seq i64 | four moments or sizes u64

Little endian; moments are nanoseconds of the monotonic clock. A record is written when something begins and filled when it ends, so that
whoever reads the memory of a process that was killed finds what it was doing. Writing one takes 0.3 us, and nothing is allocated.
"""

from __future__ import annotations

import enum
import itertools
import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import BadFrameError

RECORD_BYTES = 48
MAX_NAME_BYTES = 200
NO_NAME = "(other)"  # number 0
_MAGIC = int.from_bytes(b"zspmdtr1", "little")
_RECORDS_AT = 1 << 16
_NAMES_AT = 64
_RECORD_WORDS = RECORD_BYTES // 8
_CAPACITY, _WRITTEN, _CLOSED, _NAMES_BYTES, _UNNAMED = range(1, 6)
_pack_record = struct.Struct("<Qq4Q").pack_into
_LENGTH = struct.Struct("<H")
RECORD = np.dtype(
    [("kind", "u1"), ("thread", "u1"), ("name", "<u2"), ("detail", "<u4"), ("seq", "<i8"), *((f"t{n}", "<u8") for n in range(4))]
)


class TraceKind(enum.IntEnum):
    """What a record says; ``seq`` is the frame that it belongs to, -1 for none."""

    SPAN = 1  # t0 to t1; name
    COLLECTIVE = 2  # t0 to t1; name, detail: the name of the axis, t2: bytes
    MARK = 3  # at t0; name
    THREAD = 4  # the name of a thread
    STEP = 5  # of a rank: t0 received, t1 done, t2 waiting since, t3 answered; detail: step id, modulo 2^32
    CALL = 6  # likewise
    ASKED_STEP = 7  # of the driver: t0 asked, t1 encoded, t2 published; detail: step id, modulo 2^32
    ASKED_CALL = 8  # likewise; name: of the method
    ANSWERED = 9  # of the driver: t0 to t1; detail: the rank


class TraceRecords(NamedTuple):
    """What a buffer held: its records in the order in which they began, and the names that they refer to.

    Attributes:
        table: structured [N], the fields of ``RECORD``.
        first: the number of the first of them; so many are not kept any more.
        is_closed: whether the process came to its end in order.
        num_unnamed: how many names had no room in the table of names, and are number 0.
    """

    table: npt.NDArray[np.void]
    names: list[str]
    first: int
    is_closed: bool
    num_unnamed: int


def record_head(kind: TraceKind, name: int = 0, detail: int = 0) -> int:
    """Return the first word of a record; ``thread`` is added by shifting it by 8."""
    return kind | name << 16 | (detail & 0xFFFF_FFFF) << 32


class TraceBuffer:
    """One process's records. Any of its threads writes; ``capacity`` is a power of two."""

    def __init__(self, memory: mmap.mmap | bytearray) -> None:
        self._memory = memoryview(memory)
        self._words = self._memory.cast("Q")
        if self._words[0] != _MAGIC or len(self._memory) != size_of(self.capacity):
            raise BadFrameError(f"no buffer of a trace: {len(self._memory)} B that begin with {bytes(self._memory[:8])!r}")
        self._mask = self.capacity - 1
        self._take_number = itertools.count().__next__
        self._lock = threading.Lock()
        self._names = {name: number for number, name in enumerate(self.names())}
        self._num_names = len(self._names)
        self.name_number(NO_NAME)

    @classmethod
    def in_memory(cls, capacity: int) -> TraceBuffer:
        """Make one that no other process sees."""
        memory = bytearray(size_of(capacity))
        return cls(_formatted(memory, capacity))

    @classmethod
    def in_file(cls, fd: int, capacity: int) -> TraceBuffer:
        """Make one in an empty file, which takes up its room at once: no later write can fail, which would end the process. OSError."""
        os.posix_fallocate(fd, 0, size_of(capacity))
        return cls(_formatted(mmap.mmap(fd, 0), capacity))

    @classmethod
    def open(cls, path: str) -> TraceBuffer:
        """Open one that another process has made in a file; raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(mmap.mmap(fd, 0))
        finally:
            os.close(fd)

    @property
    def capacity(self) -> int:
        """How many records are kept."""
        return self._words[_CAPACITY]

    @property
    def num_written(self) -> int:
        """How many records there ever were."""
        return self._words[_WRITTEN]

    def add(self, head: int, seq: int, t0: int, t1: int = 0, t2: int = 0, t3: int = 0) -> int:
        """Write a record and return its number; the oldest makes room."""
        number = self._take_number()
        _pack_record(self._memory, _RECORDS_AT + (number & self._mask) * RECORD_BYTES, head, seq, t0, t1, t2, t3)
        self._words[_WRITTEN] = number + 1
        return number

    def writers(self) -> tuple[Callable[[int, int, int], int], Callable[[int], None]]:
        """Return what writes a record that begins now, of (head, seq, t2), and what completes it now.

        They are ``add`` and ``fill`` for those that need them ten times a step: without a look-up of an attribute, which in a process
        whose caches hold a model takes longer than in a loop that does nothing else.
        """
        memory, words, mask, take_number, clock = self._memory, self._words, self._mask, self._take_number, time.monotonic_ns
        first_end = _RECORDS_AT // 8 + 3

        def begin(head: int, seq: int, t2: int) -> int:
            number = take_number()
            _pack_record(memory, _RECORDS_AT + (number & mask) * RECORD_BYTES, head, seq, clock(), 0, t2, 0)
            words[_WRITTEN] = number + 1
            return number

        def end(number: int) -> None:
            if words[_WRITTEN] - number <= mask:
                words[first_end + (number & mask) * _RECORD_WORDS] = clock()

        return begin, end

    def fill(self, number: int, t1: int, t3: int = 0) -> None:
        """Complete a record, if it is still kept."""
        if self._words[_WRITTEN] - number <= self._mask:
            at = (_RECORDS_AT // 8) + (number & self._mask) * _RECORD_WORDS
            if t3:
                self._words[at + 5] = t3
            self._words[at + 3] = t1  # last: by this a reader knows that it is complete

    def name_number(self, name: str) -> int:
        """Return the number by which records refer to a name; 0 when there is no room for another."""
        known = self._names.get(name)
        if known is not None:
            return known
        with self._lock:
            encoded = name.encode(errors="replace")[:MAX_NAME_BYTES]
            kept = encoded.decode(errors="ignore")
            number = self._names.get(kept)
            if number is None:
                number = self._add_name(encoded)
            if number:  # else there may be more of them than anybody counted on
                self._names[name] = self._names[kept] = number
            return number

    def _add_name(self, encoded: bytes) -> int:
        at = _NAMES_AT + self._words[_NAMES_BYTES]
        if at + _LENGTH.size + len(encoded) > _RECORDS_AT:
            self.num_unnamed += 1
            return 0
        self._memory[at + _LENGTH.size : at + _LENGTH.size + len(encoded)] = encoded
        _LENGTH.pack_into(self._memory, at, len(encoded))
        self._words[_NAMES_BYTES] += _LENGTH.size + len(encoded)
        self._num_names += 1
        return self._num_names - 1

    @property
    def num_unnamed(self) -> int:
        """How many names had no room."""
        return self._words[_UNNAMED]

    @num_unnamed.setter
    def num_unnamed(self, count: int) -> None:
        self._words[_UNNAMED] = count

    def close(self) -> None:
        """Say that nothing is missing at the end."""
        self._words[_CLOSED] = 1

    def read(self) -> TraceRecords:
        """Return a copy of what is there. One that is being overwritten right now, the oldest, is left out."""
        written, capacity = self.num_written, self.capacity
        first = max(0, written - capacity + 1)
        table = self.rows(np.arange(first, written))
        return TraceRecords(table, self.names(), first, bool(self._words[_CLOSED]), self.num_unnamed)

    def rows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """Return a copy of the records of these numbers, which must be kept."""
        rows: npt.NDArray[np.void] = self._table()[numbers & self._mask]
        return rows

    def put(self, numbers: npt.NDArray[np.int64], rows: npt.NDArray[np.void]) -> None:
        """Take over records of another buffer, with their numbers there."""
        self._table()[numbers & self._mask] = rows
        self._words[_WRITTEN] = max(self.num_written, int(numbers.max(initial=-1)) + 1)

    def _table(self) -> npt.NDArray[np.void]:
        return np.frombuffer(self._memory, RECORD, self.capacity, _RECORDS_AT)

    def names(self) -> list[str]:
        """Return the names so far, by number."""
        names, at, end = list[str](), _NAMES_AT, _NAMES_AT + self._words[_NAMES_BYTES]
        while at < end:
            (length,) = _LENGTH.unpack_from(self._memory, at)
            at += _LENGTH.size + length
            names.append(bytes(self._memory[at - length : at]).decode(errors="replace"))
        return names


def size_of(capacity: int) -> int:
    """Return the bytes of a buffer that keeps so many records."""
    return _RECORDS_AT + capacity * RECORD_BYTES


def _formatted(memory: mmap.mmap | bytearray, capacity: int) -> mmap.mmap | bytearray:
    struct.pack_into("<QQ", memory, 0, _MAGIC, capacity)
    return memory
