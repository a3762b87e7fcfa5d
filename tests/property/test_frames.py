"""Headers against any numbers and any bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.values import headed

from zspmd.errors import BadFrameError, WireVersionError
from zspmd.transport.frames import (
    RESULT_MAGIC,
    STEP_MAGIC,
    ResultKind,
    StepKind,
    pack_result_header,
    pack_step_header,
    parse_result,
    parse_step,
    rank_topic,
)

QUICK = settings(deadline=None, max_examples=150)
u16, u32, u64 = st.integers(0, (1 << 16) - 1), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
bodies = st.binary(max_size=30)
buffers = st.lists(st.binary(max_size=10), max_size=4)


@QUICK
@given(st.sampled_from(StepKind), u32, u64, bodies, buffers)
def test_any_step_frame_comes_back(kind: StepKind, epoch: int, seq: int, body: bytes, parts: list[bytes]) -> None:
    frame = parse_step([pack_step_header(kind, epoch, seq) + body, *parts])
    assert frame[:3] == (kind, epoch, seq)
    assert [bytes(frame.body), *map(bytes, frame.buffers)] == [body, *parts]


@QUICK
@given(st.sampled_from(ResultKind), u32, u64, u16, u32, u64, bodies, buffers)
def test_any_result_frame_comes_back(
    kind: ResultKind, epoch: int, seq: int, rank: int, busy_us: int, received_ns: int, body: bytes, parts: list[bytes]
) -> None:
    frame = parse_result([pack_result_header(kind, epoch, seq, rank, busy_us, received_ns) + body, *parts])
    assert frame[:6] == (kind, epoch, seq, rank, busy_us, received_ns)
    assert [bytes(frame.body), *map(bytes, frame.buffers)] == [body, *parts]


@QUICK
@given(headed(STEP_MAGIC, len(StepKind)), buffers)
def test_a_hostile_step_frame_is_read_or_refused(data: bytes, parts: list[bytes]) -> None:
    try:
        frame = parse_step([data, *parts])
    except (BadFrameError, WireVersionError):
        return
    assert pack_step_header(*frame[:3]) + bytes(frame.body) == data
    assert parse_step([rank_topic(513) + data, *parts]) == frame


@QUICK
@given(headed(RESULT_MAGIC, len(ResultKind)), buffers)
def test_a_hostile_result_frame_is_read_or_refused(data: bytes, parts: list[bytes]) -> None:
    try:
        frame = parse_result([data, *parts])
    except (BadFrameError, WireVersionError):
        return
    packed = pack_result_header(*frame[:6]) + bytes(frame.body)
    assert packed[:18] + packed[20:] == data[:18] + data[20:]  # all but the reserved bytes
