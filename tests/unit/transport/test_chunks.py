"""Frames in parts: every length comes back as it was, and parts that make no frame are errors."""

from __future__ import annotations

import pytest
import zmq

from zspmd.errors import BadFrameError
from zspmd.transport.chunks import CHUNK_BYTES, join_parts, split_frame
from zspmd.transport.frames import Buffer, frame_view

LENGTHS = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES, 3 * CHUNK_BYTES + 5)


def on_the_wire(*frames: Buffer) -> list[zmq.Frame]:
    return [zmq.Frame(bytes(part)) for frame in frames for part in split_frame(frame)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview], ids=lambda kind: kind.__name__)
def test_a_frame_of_any_length_comes_back(length: int, kind: type) -> None:
    frame = kind(bytes(range(251)) * (length // 251 + 1))[:length]
    parts = on_the_wire(frame)
    assert len(parts) == length // CHUNK_BYTES + 1
    assert [bytes(frame_view(joined)) for joined in join_parts(parts)] == [bytes(frame)]


def test_frames_of_a_message_stay_apart() -> None:
    frames = [bytes([number % 256]) * length for number, length in enumerate((*LENGTHS, *reversed(LENGTHS)))]
    assert [bytes(frame_view(frame)) for frame in join_parts(on_the_wire(*frames))] == frames


def test_a_frame_in_one_part_is_not_copied() -> None:
    part = zmq.Frame(b"short")
    assert join_parts([part])[0] is part


@pytest.mark.parametrize(
    ("lengths", "complaint"),
    [([CHUNK_BYTES + 1], "the limit is 262144"), ([CHUNK_BYTES], "which another is to continue"), ([5, CHUNK_BYTES], "to continue")],
    ids=["too long a part", "unfinished", "the last unfinished"],
)
def test_parts_that_make_no_frames(lengths: list[int], complaint: str) -> None:
    with pytest.raises(BadFrameError, match=complaint):
        join_parts([zmq.Frame(bytes(length)) for length in lengths])
