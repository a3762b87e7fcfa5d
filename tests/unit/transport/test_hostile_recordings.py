"""Recordings whose checksums are right and whose entries are not what a launch writes: each a RecordingError with the offset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.recordings import build_launch

from zspmd.errors import RecordingError
from zspmd.transport.codec import ValueEncoder
from zspmd.transport.frames import StepKind
from zspmd.transport.recorded_launch import RecordedFault, RecordedRank, Recording, read_call, read_value
from zspmd.transport.recording import EntryKind, EntryWriter
from zspmd.transport.schema import pack_record

FAULT = pack_record(RecordedFault(error="E", rank=0, step_id=1, message="m"))
RANK = pack_record(RecordedRank(epoch=1, rank=0))
Entries = list[tuple[EntryKind, bytes, dict[str, Any]]]


def packed(value: Any) -> bytes:
    return ValueEncoder().encode(value)[0]


def write(path: Path, entries: Entries) -> Recording:
    writer = EntryWriter.create(str(path))
    writer.write(EntryKind.LAUNCH, pack_record(build_launch()))
    for kind, body, facts in entries:
        writer.write(kind, body, **facts)
    writer.close()
    return Recording.open(str(path))


def frame(body: bytes, *, code: int = StepKind.STEP, seq: int = 1) -> Entries:
    return [(EntryKind.FRAME, body, {"code": code, "seq": seq})]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(EntryKind.FAULT, RANK, {})], "a RecordedRank at offset .* where a fault is due"),
        ([(EntryKind.FAULT, b"\xc1", {})], "the record at offset .* cannot be read"),
        ([(EntryKind.RANK, RANK, {})], "a RANK entry at offset .*, which the file of no launch has"),
        (frame(packed(1), code=StepKind.STOP), "a frame of kind 4 at offset"),
        (frame(packed(1), code=99), "a frame of kind 99 at offset"),
        (frame(packed(1), seq=1 << 63), "has frame 9223372036854775808 at offset .* where 1 is due"),
    ],
    ids=["a fault of a rank's file", "a fault that is none", "a rank's entry", "STOP", "no kind", "a gap"],
)
def test_an_entry_out_of_place_is_refused(tmp_path: Path, entries: Entries, message: str) -> None:
    with pytest.raises(RecordingError, match=message):
        write(tmp_path / "file", entries)


@pytest.mark.parametrize(
    ("entries", "use", "message"),
    [
        ([(EntryKind.ARGUMENTS, b"\xc1", {})], Recording.worker_args, "the value at offset .* cannot be read"),
        ([(EntryKind.ARGUMENTS, packed([1]), {})], Recording.worker_args, "a list where the worker's arguments are due"),
        (frame(b"\xdd\xff\xff\xff\xff"), lambda recording: read_value(recording.frame(1)), "the value at offset .* cannot be read"),
        (frame(packed({"a": 1}), code=StepKind.CALL), lambda recording: read_call(recording.frame(1)), r"is not \[method, args, kwargs"),
        (frame(packed([["a"], [], {}, []]), code=StepKind.CALL), lambda recording: read_call(recording.frame(1)), r"is not \[method"),
    ],
    ids=[
        "arguments that are no value",
        "arguments that are a list",
        "a step that is no value",
        "a call that is a dict",
        "a method that is a list",
    ],
)
def test_a_value_of_another_form_is_refused(tmp_path: Path, entries: Entries, use: Callable[[Recording], object], message: str) -> None:
    recording = write(tmp_path / "file", entries)
    with pytest.raises(RecordingError, match=message):
        use(recording)
