from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zspmd.errors import BadFrameError
from zspmd.runtime.launch.agent_protocol import (
    MAX_RECORD_BYTES,
    AgentGone,
    AgentRecord,
    AgentStarted,
    AgentWarning,
    DriverLost,
    DumpStacks,
    GuardGone,
    Hold,
    LaunchFailed,
    RankExited,
    RankLog,
    RankStack,
    RankStart,
    RankStarted,
    RecordReader,
    Release,
    Signal,
    StacksDone,
    Start,
    Stop,
    encode_record,
)
from zspmd.transport.schema import read_record

START = Start((RankStart(0, {"A": "b", "raw": "\udcff"}, b"\0key"),), "spawn", argv=("prog", "-x"), log_dir="/logs", kill_s=0.5)
RECORDS: list[AgentRecord] = [
    START,
    Start((), "fork", preload=("torch",)),
    Stop(1.5, 2.0),
    Signal(15),
    Hold(),
    Release(),
    DumpStacks(3),
    AgentStarted(16),
    RankStarted(0, 17),
    RankLog(1, "err", ("one", "")),
    RankExited(1, 18, -9, ("last",), '{"message": 1}'),
    AgentWarning("full"),
    LaunchFailed("no"),
    RankStack(3, 1, "Thread 0x1\n  File"),
    StacksDone(3),
    AgentGone((5, 6)),
    GuardGone(),
    DriverLost("nothing was heard"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_come_back_equal(record: AgentRecord) -> None:
    assert list(RecordReader().feed(encode_record(record))) == [record]


def test_records_may_arrive_byte_by_byte() -> None:
    reader = RecordReader()
    stream = b"".join(map(encode_record, RECORDS))
    assert [record for i in range(len(stream)) for record in reader.feed(stream[i : i + 1])] == RECORDS


def test_an_announced_length_above_the_limit_is_refused_at_once() -> None:
    with pytest.raises(BadFrameError, match="announces"):
        list(RecordReader().feed(struct.pack("<I", MAX_RECORD_BYTES + 1)))


def test_a_record_that_is_too_large_is_refused_by_the_sender() -> None:
    with pytest.raises(BadFrameError, match="the limit is"):
        encode_record(Start((RankStart(0, {}, bytes(MAX_RECORD_BYTES)),), "fork"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        pytest.param([1], "not a map", id="list"),
        pytest.param({"rank": 1}, "unknown record None", id="no kind"),
        pytest.param({"record": "Exec"}, "unknown record 'Exec'", id="other kind"),
        pytest.param({"record": "RankStarted", "rank": 0}, "lacks the field pid", id="missing field"),
        pytest.param({"record": "RankStarted", "rank": 0, "pid": 1, "more": 1}, "unknown fields", id="foreign field"),
        pytest.param({"record": "RankStarted", "rank": -1, "pid": 1}, "RankStarted.rank is -1", id="negative rank"),
        pytest.param({"record": "RankStarted", "rank": True, "pid": 1}, "RankStarted.rank is a bool", id="bool for a rank"),
        pytest.param({"record": "RankStarted", "rank": 0, "pid": 0}, "RankStarted.pid is 0", id="pid 0"),
        pytest.param({"record": "Stop", "grace_s": float("nan"), "kill_s": 1}, "Stop.grace_s is nan", id="nan"),
        pytest.param({"record": "Stop", "grace_s": "1", "kill_s": 1}, "Stop.grace_s is a str", id="text for seconds"),
        pytest.param({"record": "RankLog", "rank": 0, "stream": "in", "lines": []}, "RankLog.stream is 'in'", id="stream"),
        pytest.param({"record": "RankLog", "rank": 0, "stream": "out", "lines": [1]}, "RankLog.lines has an item that is a int", id="line"),
        pytest.param({"record": "RankLog", "rank": 0, "stream": "out", "lines": "text"}, "RankLog.lines is a str", id="lines"),
        pytest.param({"record": "AgentGone", "left": ["1"]}, "AgentGone.left", id="pid in a list"),
    ],
)
def test_malformed_records_say_which_field(values: object, words: str) -> None:
    with pytest.raises(BadFrameError, match=words):
        read_record(AgentRecord, msgpack.packb(values))


@pytest.mark.parametrize(
    ("field", "value"),
    [("ranks", [1]), ("ranks", [{"rank": 0}]), ("start_method", "exec"), ("argv", [b"x"]), ("log_dir", 1), ("kill_s", -2)],
    ids=["rank", "rank fields", "method", "argument", "log_dir", "kill_s"],
)
def test_malformed_starts_are_refused(field: str, value: object) -> None:
    values = msgpack.unpackb(encode_record(START)[4:], unicode_errors="surrogateescape")
    with pytest.raises(BadFrameError, match="rank|RankStart" if field == "ranks" else field):
        read_record(AgentRecord, msgpack.packb({**values, field: value}, unicode_errors="surrogateescape"))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_record_or_a_bad_frame(body: bytes) -> None:
    try:
        record = read_record(AgentRecord, body)
    except BadFrameError:
        return
    assert list(RecordReader().feed(encode_record(record))) == [record]


@given(st.data())
def test_a_damaged_record_is_a_bad_frame_or_another_record(data: st.DataObject) -> None:
    body = bytearray(encode_record(data.draw(st.sampled_from(RECORDS)))[4:])
    body[data.draw(st.integers(0, len(body) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        record = read_record(AgentRecord, bytes(body))
    except BadFrameError:
        return
    assert list(RecordReader().feed(encode_record(record))) == [record]
