"""The file format of recordings: checked entries one after another, each whole in the file once it is written.

    file    magic "zspmdrec" | version u16 | zero u16                                                                       12 B
    entry   kind u8 | code u8 | rank u16 | num_buffers u32 | seq u64 | body_bytes u32 | crc32 of body and buffers u32       24 B
            | crc32 of these u32 | with buffers: the bytes of each u64, and their crc32 u32 | body | buffers

Little endian. What entries hold is the business of ``recorded_launch`` and of ``workers.recording``. An entry is handed to the kernel
in one call, straight from where its buffers lie, so that nothing is copied here and nothing is lost with the process. That takes about
5 us, and 1 to 2 ms a MiB for checksum and page cache, for which the caller waits.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import RecordingError
from .codec import MAX_BODY_BYTES
from .frames import MAX_BUFFERS, Buffer

RECORDING_VERSION = 1
_MAGIC = b"zspmdrec"
_FILE_HEAD = struct.Struct("<8sHH")
_HEAD = struct.Struct("<BBHIQII")
_CRC = struct.Struct("<I")
_MAX_PARTS = 1024  # of one writev


class EntryKind(enum.IntEnum):
    """What an entry holds; ``code``, ``rank`` and ``seq`` say more of it."""

    LAUNCH = 1  # the record of the whole launch
    ARGUMENTS = 2  # the worker's, a value
    FRAME = 3  # published; code is its StepKind
    ANSWER = 4  # of a rank; code is its ResultKind
    FAULT = 5  # the record of the first cause
    RANK = 6  # the record of one rank's file
    PEERS = 7  # what a collective or the store gave to a rank, a value
    END = 8  # closed in order: nothing is missing


class Entry(NamedTuple):
    """One entry; body and buffers are views of the file. ``offset`` is its place there."""

    kind: EntryKind
    code: int
    rank: int
    seq: int
    body: memoryview
    buffers: Sequence[memoryview]
    offset: int


class EntryWriter:
    """Appends entries to a new file until it is closed, or until the file cannot be written.

    Then it says so once on stderr, takes back what was half written, and ignores every further entry: a full disk ends a recording,
    not the launch that is recorded.
    """

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd
        self._size_bytes = 0

    @classmethod
    def create(cls, path: str) -> EntryWriter:
        """Make the file, readable by its owner only; raises OSError, FileExistsError among them."""
        writer = cls(path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        writer._append([_FILE_HEAD.pack(_MAGIC, RECORDING_VERSION, 0)])
        return writer

    @property
    def is_open(self) -> bool:
        return self._fd >= 0

    def write(
        self, kind: EntryKind, body: Buffer = b"", buffers: Sequence[Buffer] = (), *, code: int = 0, rank: int = 0, seq: int = 0
    ) -> None:
        """Append one entry; the buffers are the caller's again when it returns."""
        if self._fd < 0:
            return
        crc = zlib.crc32(body)
        for buffer in buffers:
            crc = zlib.crc32(buffer, crc)
        head = _with_checksum(_HEAD.pack(kind, code, rank, len(buffers), seq, len(body), crc))
        if buffers:
            head += _with_checksum(struct.pack(f"<{len(buffers)}Q", *map(len, buffers)))
        self._append([head, body, *buffers])

    def close(self) -> None:
        """Mark the file as complete and close it; idempotent."""
        self.write(EntryKind.END)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._close_fd(fd)

    def _append(self, parts: list[Buffer]) -> None:
        try:
            self._size_bytes += _write_all(self._fd, parts)
        except OSError as error:
            _tell(f"the recording {self._path} ends after {self._size_bytes} B: {error}; what is recorded goes on without it")
            fd, self._fd = self._fd, -1
            try:
                os.ftruncate(fd, self._size_bytes)
            except OSError as truncation:
                _tell(f"its last entry stays cut: {truncation}")
            self._close_fd(fd)

    def _close_fd(self, fd: int) -> None:
        try:
            os.close(fd)
        except OSError as error:  # some file systems write only now; the descriptor is gone all the same
            _tell(f"the recording {self._path} may be cut: {error}")


class EntryFile:
    """A recording that is read: iterate over its entries, or look one up by its offset.

    Attributes:
        note: after a whole iteration, why the file is not complete; empty if it is.
    """

    def __init__(self, path: str, data: memoryview) -> None:
        self._path = path
        self._data = data
        self.note = ""

    @classmethod
    def open(cls, path: str) -> EntryFile:
        """Map the file.

        Raises:
            RecordingError: it cannot be read, is no recording, or one of another version.
        """
        try:
            with open(path, "rb") as file:
                is_empty = os.fstat(file.fileno()).st_size == 0
                data = memoryview(b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise RecordingError(f"cannot read the recording {path}: {error}") from error
        if len(data) < _FILE_HEAD.size or data[: len(_MAGIC)] != _MAGIC:
            raise RecordingError(f"{path} is no recording: it begins with {bytes(data[:8])!r} instead of {_MAGIC!r}")
        _, version, _ = _FILE_HEAD.unpack_from(data)
        if version != RECORDING_VERSION:
            raise RecordingError(f"{path} has recording version {version}, this zspmd reads {RECORDING_VERSION}: use the one that wrote it")
        return cls(path, data)

    def __iter__(self) -> Iterator[Entry]:
        """Yield every whole entry, checked; ``note`` is set at the end.

        Raises:
            RecordingError: an entry is damaged; names its offset.
        """
        offset, is_complete = _FILE_HEAD.size, False
        while offset < len(self._data):
            entry, end = self._read(offset, is_checked=True)
            if entry is None:
                self.note = f"{self._path} is cut inside the entry at offset {offset}; what lies before it is used"
                return
            is_complete = entry.kind is EntryKind.END
            yield entry
            offset = end
        if not is_complete:
            self.note = f"{self._path} was not closed: whoever wrote it ended or ran out of disk after {offset} B"

    def entry(self, offset: int) -> Entry:
        """Return the entry at an offset that an iteration gave."""
        entry, _ = self._read(offset, is_checked=False)
        if entry is None:
            raise self._damage(offset, "no whole entry begins there")
        return entry

    def _read(self, offset: int, *, is_checked: bool) -> tuple[Entry | None, int]:
        """Return the entry and its end; None for one that the end of the file cuts."""
        head, at = self._checked_part(offset, offset, _HEAD.size)
        if head is None:
            return None, offset
        kind, code, rank, num_buffers, seq, body_bytes, crc = _HEAD.unpack(head)
        if kind not in _KINDS or num_buffers > MAX_BUFFERS or body_bytes > MAX_BODY_BYTES:
            raise self._damage(offset, f"kind {kind}, {num_buffers} buffers and a body of {body_bytes} B")
        lengths = [body_bytes]
        if num_buffers:
            packed, at = self._checked_part(offset, at, 8 * num_buffers)
            if packed is None:
                return None, offset
            lengths += struct.unpack(f"<{num_buffers}Q", packed)
        start, views = at, []
        for length in lengths:
            views.append(self._data[at : at + length])
            at += length
        if at > len(self._data):
            return None, offset
        if is_checked and zlib.crc32(self._data[start:at]) != crc:
            raise self._damage(offset, f"its {at - start} B do not match their checksum")
        return Entry(_KINDS[kind], code, rank, seq, views[0], views[1:], offset), at

    def _checked_part(self, offset: int, at: int, size: int) -> tuple[memoryview | None, int]:
        """Return a part of the entry at ``offset`` that has a checksum of its own behind it, and where that ends; None where cut."""
        end = at + size
        if end + _CRC.size > len(self._data):
            return None, at
        if zlib.crc32(self._data[at:end]) != _CRC.unpack_from(self._data, end)[0]:
            raise self._damage(offset, "its head does not match its checksum")
        return self._data[at:end], end + _CRC.size

    def _damage(self, offset: int, what: str) -> RecordingError:
        return RecordingError(f"{self._path} is damaged in the entry at offset {offset}: {what}; record again, or restore the file")


_KINDS = {int(kind): kind for kind in EntryKind}


def _with_checksum(part: bytes) -> bytes:
    return part + _CRC.pack(zlib.crc32(part))


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be a file on the same full disk: the launch is not to fail for that either
        print(f"zspmd: {text}", file=sys.stderr)


def _write_all(fd: int, parts: list[Buffer]) -> int:
    """Write all parts, however little the kernel takes at once; returns their bytes."""
    total = sum(map(len, parts))
    written = os.writev(fd, parts[:_MAX_PARTS])
    if written == total:
        return total
    left = [memoryview(part) for part in parts]
    while True:
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if not left:
            return total
        left[0] = left[0][written:]
        written = os.writev(fd, left[:_MAX_PARTS])
