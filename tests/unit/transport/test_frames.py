"""The fixed headers: sizes, round trips, and what is refused."""

from __future__ import annotations

import pytest

from zspmd.errors import BadFrameError, WireVersionError
from zspmd.transport.frames import (
    MAX_BUFFERS,
    RESULT_HEADER,
    STEP_HEADER,
    STEP_TOPIC,
    ResultKind,
    StepKind,
    pack_result_header,
    pack_step_header,
    parse_result,
    parse_step,
    rank_topic,
)

MAX_U32, MAX_U64 = (1 << 32) - 1, (1 << 64) - 1


def test_headers_have_their_documented_sizes() -> None:
    assert (STEP_HEADER.size, RESULT_HEADER.size) == (16, 32)
    assert len(pack_step_header(StepKind.STEP, 1, 2)) == 16
    assert len(pack_result_header(ResultKind.ACK, 1, 2, 3, 4)) == 32


def test_the_step_header_is_laid_out_as_documented() -> None:
    assert pack_step_header(StepKind.CALL, 0x01020304, 0x05) == b"SZ\x06\x03" + b"\x04\x03\x02\x01" + b"\x05" + bytes(7)


def test_the_result_header_is_laid_out_as_documented() -> None:
    wanted = b"RZ\x06\x05" + b"\x04\x03\x02\x01" + b"\x05" + bytes(7) + b"\x07\x00" + bytes(2) + b"\x09\x00\x00\x00" + b"\x0b" + bytes(7)
    assert pack_result_header(ResultKind.CALL_ERROR, 0x01020304, 5, 7, 9, 11) == wanted


@pytest.mark.parametrize("kind", StepKind)
def test_a_step_frame_comes_back(kind: StepKind) -> None:
    frame = parse_step([pack_step_header(kind, MAX_U32, MAX_U64) + b"body", b"one", b""])
    assert (frame.kind, frame.epoch, frame.seq, bytes(frame.body)) == (kind, MAX_U32, MAX_U64, b"body")
    assert [bytes(buffer) for buffer in frame.buffers] == [b"one", b""]
    again = parse_step([rank_topic(0x525A) + pack_step_header(kind, MAX_U32, MAX_U64) + b"body", b"one", b""])
    assert again == frame


@pytest.mark.parametrize("kind", ResultKind)
def test_a_result_frame_comes_back(kind: ResultKind) -> None:
    frame = parse_result([pack_result_header(kind, MAX_U32, MAX_U64, 65_535, 12, MAX_U64) + b"body", b"one"])
    assert (frame.kind, frame.epoch, frame.seq, frame.rank) == (kind, MAX_U32, MAX_U64, 65_535)
    assert (frame.busy_us, frame.received_ns) == (12, MAX_U64)
    assert bytes(frame.body) == b"body"
    assert [bytes(buffer) for buffer in frame.buffers] == [b"one"]


def test_busy_time_saturates() -> None:
    assert parse_result([pack_result_header(ResultKind.ACK, 0, 0, 0, 1 << 40)]).busy_us == MAX_U32


STEP, RESULT = pack_step_header(StepKind.STEP, 1, 2), pack_result_header(ResultKind.ACK, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "0 frames"),
        ([STEP, *[b""] * (MAX_BUFFERS + 1)], f"limit is one and {MAX_BUFFERS}"),
        ([b""], "has 0 B; its header alone has 16"),
        ([STEP[:15]], "has 15 B"),
        ([RESULT], "begins with b'RZ' instead of b'SZ'"),
        ([b"S\0" + STEP[2:]], "begins with"),
        ([STEP[:3] + b"\0" + STEP[4:]], "kind 0; known are 1 to 5"),
        ([STEP[:3] + b"\x06" + STEP[4:]], "kind 6"),
        ([rank_topic(0) + RESULT], "begins with"),
        ([rank_topic(0) + STEP[:15]], "has 15 B"),
        ([rank_topic(0)], "has 3 B"),
        ([rank_topic(0) * 2 + STEP], "begins with"),
    ],
    ids=[
        "nothing",
        "too many buffers",
        "empty",
        "cut",
        "a result",
        "wrong magic",
        "kind 0",
        "kind 6",
        "a result again",
        "cut again",
        "a topic alone",
        "two topics",
    ],
)
def test_a_bad_step_frame_is_refused(frames: list[bytes], words: str) -> None:
    with pytest.raises(BadFrameError, match=words):
        parse_step(frames)


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([], "0 frames"),
        ([RESULT[:31]], "has 31 B; its header alone has 32"),
        ([STEP + bytes(16)], "begins with b'SZ' instead of b'RZ'"),
        ([rank_topic(3) + RESULT], "begins with b'T"),
        ([RESULT[:3] + b"\0" + RESULT[4:]], "rank 3 has kind 0; known are 1 to 8"),
        ([RESULT[:3] + b"\x09" + RESULT[4:]], "kind 9"),
    ],
    ids=["nothing", "cut", "a step", "to a rank", "kind 0", "kind 9"],
)
def test_a_bad_result_frame_is_refused(frames: list[bytes], words: str) -> None:
    with pytest.raises(BadFrameError, match=words):
        parse_result(frames)


def test_another_version_is_named() -> None:
    with pytest.raises(WireVersionError, match="version 1, this side 6"):
        parse_step([STEP[:2] + b"\x01" + STEP[3:]])
    with pytest.raises(WireVersionError, match="version 0, this side 6"):
        parse_result([RESULT[:2] + b"\0" + RESULT[3:]])


def test_topics_do_not_match_each_other() -> None:
    topics = [STEP_TOPIC, *(rank_topic(rank) for rank in (0, 1, 256, 65_535))]
    assert not [(a, b) for a in topics for b in topics if a != b and b.startswith(a)]
