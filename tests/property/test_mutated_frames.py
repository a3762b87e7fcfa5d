"""Damaged frames in bulk, at every reader: refused by name or taken, cheaply, and without a trace of memory.

Whoever sees one fail gets the number of the frame: ``Frames(reader).frame(number)`` makes it again. What refusing may cost, and why
values are an exception to it, stands in ``test_hostile_frames.py``.
"""

from __future__ import annotations

import gc
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

import msgpack
import pytest
from support import valid_frames
from support.memory import resident_bytes
from support.valid_frames import mutate, mutate_message, mutate_recording, recording_file

from zspmd.errors import BadFrameError, RecordingError, WireVersionError
from zspmd.runtime.launch.agent_protocol import RecordReader
from zspmd.transport.batch import decode_batch_step
from zspmd.transport.codec import decode_value
from zspmd.transport.frames import parse_result, parse_step
from zspmd.transport.recorded_launch import Recording, RecordingRecord, read_value
from zspmd.transport.recording import EntryFile
from zspmd.transport.records import unpack_record
from zspmd.transport.schema import read_record

pytestmark = pytest.mark.usefixtures("no_bridges")
ROOM_BYTES = 96 << 10
MOST_OF_A_VALUE = 100
LEAK_BYTES = 256 << 10
RESIDENT_BYTES = 16 << 20  # what C code holds shows here alone
NUM_SOUND = 300
REFUSALS = (BadFrameError, WireVersionError, RecordingError)


def read_step(message: list[bytes]) -> None:
    frame = parse_step(message)
    decode_value(frame.body, frame.buffers)


def read_result(message: list[bytes]) -> None:
    frame = parse_result(message)
    decode_value(frame.body, frame.buffers)


def read_recording(data: bytes) -> None:
    recording = Recording("a recording", EntryFile("a recording", memoryview(data)))
    recording.worker_args()
    for frame in recording.frames():
        read_value(frame)


class Frames:
    """The frames of one reader: the n-th damaged one is always the same."""

    def __init__(
        self,
        make: Callable[[random.Random], Any],
        read: Callable[[Any], object],
        damage: Callable[[random.Random, Any], Any] = mutate,
        finish: Callable[[Any], Any] = lambda frame: frame,
    ) -> None:
        self._make, self._damage, self._finish = make, damage, finish
        self.read = read

    @cached_property
    def _sound(self) -> list[Any]:
        return [self._make(random.Random(number)) for number in range(NUM_SOUND)]

    def sound(self) -> list[Any]:
        return [self._finish(frame) for frame in self._sound]

    def frame(self, number: int) -> Any:
        return self._damage(random.Random(number), self._sound[number % NUM_SOUND])


READERS = {
    "a step": Frames(valid_frames.step_message, read_step, mutate_message),
    "a result": Frames(valid_frames.result_message, read_result, mutate_message),
    "a value": Frames(valid_frames.value_body, lambda body: decode_value(body, ())),
    "a batch step": Frames(valid_frames.batch_step, decode_batch_step),
    "a control record": Frames(valid_frames.control_record, unpack_record),
    "a recording's record": Frames(valid_frames.recording_record, lambda data: read_record(RecordingRecord, data)),
    "the agent's stream": Frames(valid_frames.agent_stream, lambda data: list(RecordReader().feed(data))),
    "a recording": Frames(valid_frames.recording_parts, read_recording, mutate_recording, recording_file),
}


def size_of(frame: bytes | list[bytes]) -> int:
    return len(frame) if isinstance(frame, bytes) else sum(map(len, frame))


def may_build(frame: bytes | list[bytes]) -> bool:
    """Whether a value in the frame is sound as msgpack from some point on, so that it is built before anything in it is refused."""
    body = frame if isinstance(frame, bytes) else frame[0]
    for start in (0, 16, 19, 32):
        unpacker = msgpack.Unpacker()
        unpacker.feed(body[start:])
        try:
            unpacker.skip()
        except msgpack.UnpackException:
            continue
        return True
    return False


def judge(frames: Frames, number: int) -> str:
    """Read one damaged frame; returns "taken" or the error, and fails the test for any other error, or for too much memory."""
    frame = frames.frame(number)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    try:
        frames.read(frame)
        verdict = "taken"
    except REFUSALS as error:
        verdict = type(error).__name__
    except Exception as error:
        raise AssertionError(f"frame {number} raised {type(error).__name__}: {error}") from error
    peak = tracemalloc.get_traced_memory()[1] - before
    limit = 4 * size_of(frame) + ROOM_BYTES
    if peak > limit and (verdict == "taken" or may_build(frame)):
        limit = MOST_OF_A_VALUE * size_of(frame) + ROOM_BYTES
    assert peak <= limit, f"frame {number} of {size_of(frame)} B, {verdict}, took {peak} B"
    return verdict


@pytest.mark.parametrize("count", [pytest.param(50_000, id="50,000"), pytest.param(1_000_000, id="1,000,000", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", READERS)
def test_damaged_frames_are_refused_by_name_and_leave_nothing(
    name: str, count: int, record_property: Callable[[str, object], None]
) -> None:
    frames, verdicts = READERS[name], Counter[str]()
    share = count // len(READERS)
    slowest_s, held, resident = 0.0, 0, 0
    frames.sound()  # made once, outside of what is measured
    tracemalloc.start()
    try:
        for number in range(share):
            began = time.perf_counter()
            verdicts[judge(frames, number)] += 1
            slowest_s = max(slowest_s, time.perf_counter() - began)
            if number == share // 5:  # by now every cache is full
                gc.collect()
                held, resident = tracemalloc.get_traced_memory()[0], resident_bytes()
        gc.collect()
        grown, resident_grown = tracemalloc.get_traced_memory()[0] - held, resident_bytes() - resident
    finally:
        tracemalloc.stop()
    print(f"{name}: {dict(verdicts)}, slowest {slowest_s * 1000:.1f} ms, {grown} B more at the end, {resident_grown} B resident")
    assert grown <= LEAK_BYTES
    assert resident_grown <= RESIDENT_BYTES
    assert verdicts["BadFrameError"] + verdicts["RecordingError"] >= share // 4  # the damage is real
    assert verdicts["taken"]  # and does not end at the first byte


@pytest.mark.parametrize("name", READERS)
def test_undamaged_they_are_all_taken(name: str) -> None:
    frames = list(READERS[name].sound())
    for frame in frames:
        READERS[name].read(frame)
    assert frames
