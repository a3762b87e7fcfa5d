"""The file of a recording: what is written is read, and what is cut, damaged or of another kind is told apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.recordings import build_launch, write_recording

import zspmd
from zspmd.errors import RecordingError
from zspmd.transport.frames import MAX_BUFFERS, ResultKind, StepKind
from zspmd.transport.recorded_launch import RecordedFault, RecordedRank, Recording
from zspmd.transport.recording import EntryFile, EntryKind, EntryWriter
from zspmd.transport.schema import pack_record

HEAD_BYTES = 12
FULL_DISK = """
import resource, sys
from zspmd.transport.recording import EntryKind, EntryWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
writer = EntryWriter.create(sys.argv[1])
for seq in range(1, 100):
    writer.write(EntryKind.FRAME, bytes(100), code=2, seq=seq)
print(writer.is_open)
writer.close()
"""


def write(path: Path) -> list[int]:
    """Write three entries and the end; returns the offsets of all."""
    writer = EntryWriter.create(str(path))
    writer.write(EntryKind.FRAME, b"body", code=2, seq=1)
    writer.write(EntryKind.ANSWER, b"", [b"x" * 5000, memoryview(bytes(3))], code=4, rank=7, seq=1 << 40)
    writer.write(EntryKind.PEERS, bytearray(b"more"))
    writer.close()
    return [entry.offset for entry in EntryFile.open(str(path))]


def test_entries_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "file")
    file = EntryFile.open(str(tmp_path / "file"))
    first, second, third, end = file
    assert (first.kind, first.code, first.seq, bytes(first.body), list(first.buffers)) == (EntryKind.FRAME, 2, 1, b"body", [])
    assert (second.rank, second.seq, [len(buffer) for buffer in second.buffers]) == (7, 1 << 40, [5000, 3])
    assert bytes(third.body) == b"more"
    assert end.kind is EntryKind.END
    assert file.note == ""
    assert file.entry(second.offset) == second


ENTRIES = st.tuples(
    st.sampled_from(EntryKind),
    st.integers(0, 255),
    st.integers(0, 65_535),
    st.integers(0, (1 << 64) - 1),
    st.binary(max_size=100),
    st.lists(st.binary(max_size=100), max_size=5),
)


@given(st.lists(ENTRIES, max_size=6))
def test_any_entries_come_back(tmp_path_factory: pytest.TempPathFactory, entries: list[Any]) -> None:
    path = tmp_path_factory.mktemp("recordings") / "file"
    writer = EntryWriter.create(str(path))
    for kind, code, rank, seq, body, buffers in entries:
        writer.write(kind, body, buffers, code=code, rank=rank, seq=seq)
    writer.close()
    *read, _ = EntryFile.open(str(path))
    assert [(e.kind, e.code, e.rank, e.seq, bytes(e.body), [bytes(b) for b in e.buffers]) for e in read] == entries


def test_as_many_buffers_as_a_message_has_are_written_in_pieces(tmp_path: Path) -> None:
    writer = EntryWriter.create(str(tmp_path / "file"))
    buffers = [bytes([number % 251]) * number for number in range(MAX_BUFFERS)]
    writer.write(EntryKind.FRAME, b"body", buffers)
    writer.close()
    entry, _ = EntryFile.open(str(tmp_path / "file"))
    assert [bytes(buffer) for buffer in entry.buffers] == buffers


def test_whatever_is_cut_off_the_whole_entries_before_it_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    offsets = write(path)
    data = path.read_bytes()
    for size in range(HEAD_BYTES, len(data), 7):
        path.write_bytes(data[:size])
        file = EntryFile.open(str(path))
        num_whole = sum(end <= size for end in [*offsets[1:], len(data)])
        assert len(list(file)) == num_whole
        if size in [HEAD_BYTES, *offsets]:
            what = f"was not closed: whoever wrote it ended or ran out of disk after {size} B"
        else:
            what = f"cut inside the entry at offset {offsets[num_whole]}"
        assert what in file.note


def test_a_writer_that_was_not_closed_leaves_a_note(tmp_path: Path) -> None:
    writer = EntryWriter.create(str(tmp_path / "file"))
    writer.write(EntryKind.FRAME, b"body")
    file = EntryFile.open(str(tmp_path / "file"))
    assert len(list(file)) == 1  # nothing waits in a buffer of the process
    assert "was not closed" in file.note
    writer.close()


def test_any_flipped_bit_is_damage_that_names_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "file"
    offsets = write(path)
    data = path.read_bytes()
    for at in range(HEAD_BYTES, len(data), 5):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        entry = max(offset for offset in offsets if offset <= at)
        file = EntryFile.open(str(path))
        with pytest.raises(RecordingError, match=f"{path} is damaged in the entry at offset {entry}: "):
            list(file)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "is no recording: it begins with b''"),
        (b"zspmd", "is no recording: it begins with b'zspmd' instead of b'zspmdrec'"),
        (b"#!/usr/bin/python", "is no recording: it begins with b'#!/usr/b'"),
        (b"zspmdrec\x09\x00\x00\x00", "has recording version 9, this zspmd reads 1"),
    ],
    ids=["empty", "short", "text", "version"],
)
def test_other_files_are_refused(tmp_path: Path, data: bytes, told: str) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(RecordingError, match=told):
        EntryFile.open(str(tmp_path / "file"))


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"cannot read the recording .*absent: .*No such file"):
        EntryFile.open(str(tmp_path / "absent"))


def test_nothing_is_overwritten_and_nobody_else_may_read(tmp_path: Path) -> None:
    write(tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        EntryWriter.create(str(tmp_path / "file"))


def test_a_full_disk_ends_the_recording_with_one_line_and_whole_entries(tmp_path: Path) -> None:
    path = tmp_path / "file"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True, timeout=60)
    size = path.stat().st_size
    assert done.stdout == "False\n"
    assert (
        done.stderr == f"zspmd: the recording {path} ends after {size} B: [Errno 27] File too large; what is recorded goes on without it\n"
    )
    file = EntryFile.open(str(path))
    assert [entry.seq for entry in file] == list(range(1, 8))
    assert "ran out of disk" in file.note


def test_a_full_disk_under_stderr_too_is_no_error_of_the_launch(tmp_path: Path) -> None:
    with open("/dev/full", "w") as stderr:
        done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "file")], stdout=subprocess.PIPE, stderr=stderr, timeout=60)
    # 120 is what the interpreter makes of a stderr that cannot be flushed.
    assert (done.returncode in (0, 120), done.stdout) == (True, b"False\n")


def test_a_disk_that_turns_out_full_when_the_file_is_closed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def close_and_refuse(fd: int) -> None:
        close(fd)
        raise OSError(28, "No space left on device")

    path, close = tmp_path / "file", os.close
    writer = EntryWriter.create(str(path))
    with monkeypatch.context() as full:
        full.setattr(os, "close", close_and_refuse)
        writer.close()
        writer.close()
    assert capsys.readouterr().err == f"zspmd: the recording {path} may be cut: [Errno 28] No space left on device\n"


def test_a_launch_is_read_back(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "run.zsr", frames=[{"x": 1}, ["info", [], {}, [0]]], answers=[(0, 1, "one"), (0, 2, "two")])
    recording = Recording.open(str(path))
    assert recording.launch == build_launch()
    assert recording.launch.parallel.world_size == 2
    assert recording.launch.deadlines.beat_s == 1.0
    assert recording.worker_args() == {"scale": 2.0}
    assert [(frame.seq, frame.code) for frame in recording.frames()] == [(1, StepKind.STEP), (2, StepKind.CALL)]
    answer = recording.answer(0, 2)
    assert answer is not None
    assert answer.code == ResultKind.REPLY
    assert recording.answer(1, 2) is None
    assert list(recording.answers()) == [(0, 1), (0, 2)]
    assert (recording.fault, recording.notes) == (None, [])


def test_another_version_is_noted(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "run.zsr", version="0.0.1")
    assert Recording.open(str(path)).notes == [f"recorded by zspmd 0.0.1, replayed by {zspmd.__version__}"]


def test_the_first_cause_is_read_back(tmp_path: Path) -> None:
    fault = RecordedFault(error="WorkerRaisedError", rank=1, step_id=3, message="raised X in its step: y")
    path = write_recording(tmp_path / "run.zsr", fault=fault)
    assert Recording.open(str(path)).fault == fault
    assert str(fault) == "WorkerRaisedError of rank 1 in step 3: raised X in its step: y"


def test_the_file_of_a_rank_is_no_launch(tmp_path: Path) -> None:
    writer = EntryWriter.create(str(tmp_path / "file"))
    writer.write(EntryKind.RANK, pack_record(RecordedRank(epoch=1, rank=0)))
    writer.close()
    with pytest.raises(RecordingError, match="does not begin with a launch"):
        Recording.open(str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("kind", "seq", "told"), [(EntryKind.FRAME, 3, "frame 3 at offset .* where 1 is due"), (EntryKind.RANK, 0, "a RANK entry")]
)
def test_entries_out_of_place_are_refused(tmp_path: Path, kind: EntryKind, seq: int, told: str) -> None:
    writer = EntryWriter.create(str(tmp_path / "file"))
    writer.write(EntryKind.LAUNCH, pack_record(build_launch()))
    writer.write(kind, b"", code=int(StepKind.STEP), seq=seq)
    writer.close()
    with pytest.raises(RecordingError, match=told):
        Recording.open(str(tmp_path / "file"))


def test_a_launch_without_arguments_was_cut(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "run.zsr")
    _, second, *_ = EntryFile.open(str(path))
    os.truncate(path, second.offset)
    recording = Recording.open(str(path))
    assert "was not closed" in recording.notes[0]
    with pytest.raises(RecordingError, match="ends before the worker's arguments"):
        recording.worker_args()
