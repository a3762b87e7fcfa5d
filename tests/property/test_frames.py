"""Headers against any numbers and any bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from zspmd.errors import BadFrameError, WireVersionError
from zspmd.transport.frames import (
    RESULT_MAGIC,
    STEP_MAGIC,
    WIRE_VERSION,
    ResultKind,
    StepKind,
    pack_result_header,
    pack_step_header,
    parse_result,
    parse_step,
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
@given(st.sampled_from(ResultKind), u32, u64, u16, u32, bodies, buffers)
def test_any_result_frame_comes_back(
    kind: ResultKind, epoch: int, seq: int, rank: int, busy_us: int, body: bytes, parts: list[bytes]
) -> None:
    frame = parse_result([pack_result_header(kind, epoch, seq, rank, busy_us) + body, *parts])
    assert frame[:5] == (kind, epoch, seq, rank, busy_us)
    assert [bytes(frame.body), *map(bytes, frame.buffers)] == [body, *parts]


def hostile(magic: bytes) -> st.SearchStrategy[bytes]:
    """Random bytes, half of which begin as a frame does."""
    return st.binary(max_size=40) | st.binary(max_size=40).map(lambda data: magic + bytes((WIRE_VERSION,)) + data)


@QUICK
@given(hostile(STEP_MAGIC), buffers)
def test_a_hostile_step_frame_is_read_or_refused(data: bytes, parts: list[bytes]) -> None:
    try:
        frame = parse_step([data, *parts])
    except (BadFrameError, WireVersionError):
        return
    assert pack_step_header(*frame[:3]) + bytes(frame.body) == data


@QUICK
@given(hostile(RESULT_MAGIC), buffers)
def test_a_hostile_result_frame_is_read_or_refused(data: bytes, parts: list[bytes]) -> None:
    try:
        frame = parse_result([data, *parts])
    except (BadFrameError, WireVersionError):
        return
    packed = pack_result_header(*frame[:5]) + bytes(frame.body)
    assert packed[:18] + packed[20:] == data[:18] + data[20:]  # all but the reserved bytes
