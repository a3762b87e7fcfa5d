"""Hostile bytes at every reader: a BadFrameError or a value, no other exception, and never much memory.

A refusal may take four times the bytes that arrived, and ``ROOM_BYTES`` for what msgpack and the error need whatever the size. There are
two exceptions. Python holds text at four bytes a character when one of them is an emoji, and for a moment at one as well: six times. And a
value that is whole as msgpack, but holds what none may hold, is refused as late as its reader gets there; until then it costs what a value
costs that is taken: its Python objects, of which an empty dict has 64 B for one byte of body.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.steps import batch_steps
from support.values import headed, mutated, values

from zspmd.errors import BadFrameError, WireVersionError
from zspmd.runtime.launch.agent_protocol import AgentGone, RankLog, RankStart, RecordReader, Start, encode_record
from zspmd.transport.batch import FIXED, SAME_DECODE, SlotAdd, decode_batch_step, encode_batch_step
from zspmd.transport.codec import MAX_BODY_BYTES, TENSOR_EXT, ValueEncoder, decode_value
from zspmd.transport.frames import RESULT_MAGIC, STEP_MAGIC, ResultKind, StepKind, parse_result, parse_step, rank_topic
from zspmd.transport.records import Failure, Hello, StoreRequest, unpack_record
from zspmd.transport.schema import pack_record

ROOM_BYTES = 96 << 10
MOST_OF_A_VALUE = 100  # times its bytes
pytestmark = pytest.mark.usefixtures("no_bridges")
QUICK = settings(deadline=None, max_examples=150)
Reader = Callable[[bytes], object]


def read_frugally(read: Reader, data: bytes, times: int = 4) -> bool:
    """Return whether hostile bytes were refused; any exception but the two allowed fails the test, and so does a large allocation."""
    tracemalloc.start()
    try:
        read(data)
        refused = False
    except (BadFrameError, WireVersionError):
        refused = True
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    factor = times if refused else MOST_OF_A_VALUE
    assert peak <= factor * len(data) + ROOM_BYTES, f"{peak} B for {len(data)} B that were {'refused' if refused else 'taken'}"
    return refused


def read_value(data: bytes) -> object:
    return decode_value(data, [])


def read_stream(data: bytes) -> object:
    return list(RecordReader().feed(data))


def read_step(data: bytes) -> object:
    return parse_step([data])


def read_result(data: bytes) -> object:
    return parse_result([data])


records = st.sampled_from(
    [
        pack_record(Failure(exception_type="E", message="m", traceback="t", phase="step", step_id=0)),
        pack_record(Hello(token=b"t", rank=1, pid=2, host="h", version="1", purpose="rank")),
        pack_record(StoreRequest(request_id=1, op="wait", keys=("a", "b"), timeout_s=1.5)),
    ]
)
agent_records = st.sampled_from(
    [
        encode_record(Start((RankStart(0, {"A": "b"}, b"key"), RankStart(1, {})), "spawn", argv=("prog",))),
        encode_record(RankLog(1, "err", ("one", "two"))),
        encode_record(AgentGone((5, 6))) * 2,
    ]
)
bodies = values.map(lambda value: ValueEncoder().encode(value)[0])
steps = batch_steps().map(encode_batch_step)
READERS: dict[str, tuple[Reader, st.SearchStrategy[bytes]]] = {
    "a step frame": (read_step, headed(STEP_MAGIC, len(StepKind)) | headed(rank_topic(1) + STEP_MAGIC, len(StepKind))),
    "a result frame": (read_result, headed(RESULT_MAGIC, len(ResultKind))),
    "a value": (read_value, mutated(bodies)),
    "tensor metadata": (read_value, st.binary(max_size=60).map(lambda data: tensor(data))),
    "a control record": (unpack_record, mutated(records)),
    "the agent's stream": (read_stream, mutated(agent_records)),
    "a batch step": (decode_batch_step, mutated(steps)),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_and_random_bytes_do_no_harm(name: str) -> None:
    read, damaged = READERS[name]

    @QUICK
    @given(st.binary(max_size=200) | damaged)
    @example(b"")
    def check(data: bytes) -> None:
        read_frugally(read, data)

    check()


@pytest.mark.parametrize("name", ["a value", "a control record", "a batch step"])
def test_what_is_cut_short_is_refused(name: str) -> None:
    read, _ = READERS[name]
    whole = {"a value": bodies, "a control record": records, "a batch step": steps}[name]

    @QUICK
    @given(st.data())
    def check(data: st.DataObject) -> None:
        frame = data.draw(whole)
        assert read_frugally(read, frame[: data.draw(st.integers(0, len(frame) - 1))])

    check()


def tensor(meta: bytes) -> bytes:
    body: bytes = msgpack.packb([msgpack.ExtType(TENSOR_EXT, meta)])
    return body


def record_map(*items: bytes) -> bytes:
    return bytes((0x80 | len(items) // 2,)) + b"".join(items)


def streamed(record: bytes) -> bytes:
    return struct.pack("<I", len(record)) + record


def text(value: str) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


KB64 = 65_536
LIARS = b"\xdd\x00\x00\xff\xff" * 1000  # lists within lists, each of which says that it has 65,535 items
EMPTIES = b"\xdd" + struct.pack(">I", KB64) + b"\x80" * KB64  # 65,536 empty maps
BOMBS: dict[str, tuple[Reader, bytes]] = {
    "value: lists that lie": (read_value, LIARS + bytes(KB64)),
    "value: maps that lie": (read_value, b"\xdf\x00\x00\xff\xff\x01" * 1000 + bytes(KB64)),
    "value: a list as long as a u32 can say": (read_value, b"\xdd\xff\xff\xff\xff" + bytes(KB64)),
    "value: bytes as long as a u32 can say": (read_value, b"\xc6\xff\xff\xff\xff" + bytes(KB64)),
    "value: text as long as a u32 can say": (read_value, b"\xdb\xff\xff\xff\xff" + bytes(KB64)),
    "value: an extension as long as a u32 can say": (read_value, b"\xc9\xff\xff\xff\xff\x01" + bytes(KB64)),
    "value: too deep": (read_value, b"\x91" * KB64),
    "value: a second value behind the first": (read_value, EMPTIES + b"\0"),
    "value: above the limit": (read_value, bytes(MAX_BODY_BYTES + 1)),
    "value: a dim without an end": (read_value, tensor(b"\x51\x20" + b"\xff" * KB64)),
    "value: dims whose product overflows": (read_value, tensor(b"\x57\x20" + b"\xff\xff\xff\xff\xff\xff\x7f" * 7)),
    "value: dims of nothing": (read_value, tensor(b"\x53\x20" + b"\xff\xff\xff\xff\xff\xff\x7f" * 2 + b"\0")),
    "record: lists that lie": (unpack_record, LIARS + bytes(KB64)),
    "record: a list where a text belongs": (unpack_record, record_map(text("record"), text("Reject"), text("reason"), EMPTIES)),
    "record: an unknown field that holds much": (unpack_record, record_map(text("record"), text("Reject"), text("more"), EMPTIES)),
    "record: a name that is long": (unpack_record, record_map(text("record"), text("\0" * KB64))),
    "record: a field name that is long": (unpack_record, record_map(text("record"), text("Reject"), text("\0" * KB64), b"\1")),
    "record: keys that lie": (
        unpack_record,
        record_map(*map(text, ("record", "StoreRequest", "keys")), b"\xdd\xff\xff\xff\xff" + bytes(KB64)),
    ),
    "record: keys that are no texts": (
        unpack_record,
        record_map(*map(text, ("record", "StoreRequest", "keys")), b"\xdc\x0f\xff" + b"\x80" * 4095),
    ),
    "stream: a length beyond the limit": (read_stream, b"\xff\xff\xff\xff" + bytes(KB64)),
    "stream: lists that lie": (read_stream, streamed(LIARS)),
    "stream: ranks that hold nothing": (
        read_stream,
        streamed(record_map(text("record"), text("Start"), text("ranks"), EMPTIES)),
    ),
    "step: block counts that lie": (decode_batch_step, FIXED.pack(0, 0, 0, 0, 0, 0xFFFF_FFFF, 0) + bytes(KB64)),
    "step: adds that lie": (decode_batch_step, FIXED.pack(SAME_DECODE, 0, 0, 0, 0, 0, len(LIARS)) + LIARS),
    "step: adds that hold nothing": (decode_batch_step, FIXED.pack(SAME_DECODE, 0, 0, 0, 0, 0, len(EMPTIES)) + EMPTIES),
    "step: fields that hold much": (
        decode_batch_step,
        FIXED.pack(SAME_DECODE, 0, 0, 0, 0, 0, len(EMPTIES) + 4) + b"\x91\xdc\x00\x10" + EMPTIES,
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_announces_more_than_there_is_is_refused_cheaply(name: str) -> None:
    read, data = BOMBS[name]
    assert read_frugally(read, data)


def test_text_that_is_refused_costs_its_characters_and_two_copies() -> None:
    wide = "\N{GRINNING FACE}" + "x" * (1 << 20)
    assert read_frugally(unpack_record, record_map(text("record"), text(wide[: 1 << 19])), times=6)
    assert read_frugally(read_value, b"\x92" + text(wide) + b"\xc7\0\5", times=6)


@pytest.mark.parametrize(
    "items", [b"\x80", b"\x90", b"\xc0", b"\xa1a", tensor(b"\x50\x20\0\0\0\0")], ids=["maps", "lists", "None", "text", "arrays"]
)
def test_a_value_takes_no_more_than_its_objects(items: bytes) -> None:
    body = b"\xdd" + struct.pack(">I", 8192) + items * 8192
    assert not read_frugally(read_value, body)


@pytest.mark.parametrize("last", [b"\xc7\0\5", b"\xa1\xff", b"\x81\x90\0"], ids=["another ext type", "no UTF-8", "a list as key"])
def test_a_value_that_is_refused_late_takes_no_more_than_one_that_is_taken(last: bytes) -> None:
    assert read_frugally(read_value, b"\x92" + EMPTIES + last, times=MOST_OF_A_VALUE)


def test_a_hostile_batch_step_holds_only_what_is_declared() -> None:
    @QUICK
    @given(mutated(steps))
    def check(data: bytes) -> None:
        try:
            step = decode_batch_step(data)
        except BadFrameError:
            return
        assert all(isinstance(add, SlotAdd) for add in step.adds)

    check()


def test_a_hostile_record_that_is_taken_can_be_sent_again() -> None:
    @QUICK
    @given(st.binary(max_size=80) | mutated(records))
    def check(data: bytes) -> None:
        try:
            record = unpack_record(data)
        except BadFrameError:
            return
        assert unpack_record(pack_record(record)) == record

    check()
