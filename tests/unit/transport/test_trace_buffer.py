"""Where a traced process keeps what it did, and how that comes to a driver which shares no memory with it."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zspmd.errors import BadFrameError
from zspmd.transport.records import TraceEvents, unpack_record
from zspmd.transport.schema import pack_record
from zspmd.transport.trace_buffer import MAX_NAME_BYTES, NO_NAME, RECORD, RECORD_BYTES, TraceBuffer, TraceKind, record_head
from zspmd.transport.trace_handover import TraceSender, take_over
from zspmd.transport.trace_spans import NO_TRACE, SpanTrace

SPAN = record_head(TraceKind.SPAN)


def test_a_record_is_as_the_table_has_it() -> None:
    assert RECORD.itemsize == RECORD_BYTES
    buffer = TraceBuffer.in_memory(64)
    buffer.add(record_head(TraceKind.COLLECTIVE, buffer.name_number("reduce"), 0xFFFF_FFFF) | 3 << 8, -1, 10, 20, 30, 1 << 63)
    records = buffer.read()
    assert records.table.tolist() == [(TraceKind.COLLECTIVE, 3, 1, 0xFFFF_FFFF, -1, 10, 20, 30, 1 << 63)]
    assert records.names == [NO_NAME, "reduce"]


@given(num=st.integers(0, 300))
def test_the_last_records_are_kept_in_order(num: int) -> None:
    buffer = TraceBuffer.in_memory(64)
    for number in range(num):
        assert buffer.add(SPAN, number, number) == number
    records = buffer.read()
    kept = min(num, 63)  # the oldest of a full buffer may be the one that is being overwritten
    assert records.table["seq"].tolist() == list(range(num - kept, num))
    assert records.first == num - kept


def test_what_has_begun_is_there_before_it_ends_and_is_left_alone_once_overwritten() -> None:
    buffer = TraceBuffer.in_memory(64)
    number = buffer.add(SPAN, 0, 5)
    assert buffer.read().table["t1"].tolist() == [0]
    buffer.fill(number, 7, 9)
    assert [buffer.read().table[name][0] for name in ("t0", "t1", "t3")] == [5, 7, 9]
    late = buffer.add(SPAN, 1, 5)
    for _ in range(64):
        buffer.add(SPAN, 2, 5)
    buffer.fill(late, 7)
    assert not buffer.read().table["t1"].any()


def test_another_process_reads_what_one_that_was_killed_has_written() -> None:
    fd = os.memfd_create("trace")
    buffer = TraceBuffer.in_file(fd, 64)
    path = f"/proc/{os.getpid()}/fd/{fd}"
    if not (pid := os.fork()):
        theirs = SpanTrace(TraceBuffer.open(path))
        with theirs.span("forward"):
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    os.close(fd)
    records = buffer.read()
    assert [(records.names[name], t1) for name, t1 in records.table[["name", "t1"]].tolist()] == [("forward", 0)]
    assert not records.is_closed


def test_memory_that_is_no_buffer_is_refused() -> None:
    with pytest.raises(BadFrameError, match="no buffer of a trace"):
        TraceBuffer(bytearray(1 << 17))


def test_names_are_bounded_in_length_and_number() -> None:
    buffer = TraceBuffer.in_memory(64)
    long = "x" * 10_000
    assert buffer.name_number(long) == buffer.name_number("x" * MAX_NAME_BYTES) == 1
    assert buffer.name_number("\udcff") == 2
    numbers = [buffer.name_number(f"{number:0100}") for number in range(1000)]
    assert numbers[0] == 3
    assert numbers[-1] == 0
    assert buffer.num_unnamed == numbers.count(0) > 0
    assert buffer.names()[1:3] == ["x" * MAX_NAME_BYTES, "?"]


def test_spans_nest_also_inside_one_of_their_own_name_and_end_when_their_block_raises() -> None:
    trace = SpanTrace(TraceBuffer.in_memory(64))
    trace.seq = 4
    with pytest.raises(ValueError, match="out"), trace.span("a"), trace.span("b"), trace.span("a"):
        raise ValueError("out")
    trace.mark("m")
    records = trace.buffer.read()
    assert [records.names[name] for name in records.table["name"]] == ["a", "b", "a", "m"]
    t0, t1 = records.table["t0"][:3], records.table["t1"][:3]
    assert t0[0] <= t0[1] <= t0[2] <= t1[2] <= t1[1] <= t1[0]
    assert set(records.table["seq"]) == {4}


def test_threads_are_told_apart() -> None:
    trace = SpanTrace(TraceBuffer.in_memory(64))
    both = threading.Barrier(2, timeout=10)

    def work() -> None:
        for _ in range(3):
            with trace.span("x"):
                both.wait()

    threads = [threading.Thread(target=work, name=f"worker {number}") for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = trace.buffer.read().table
    assert sorted(table["thread"][table["kind"] == TraceKind.SPAN]) == [1] * 3 + [2] * 3
    assert (table["t1"][table["kind"] == TraceKind.SPAN] > 0).all()


def test_no_trace_gives_the_same_span_always() -> None:
    assert NO_TRACE.span("a") is NO_TRACE.span("b")
    assert not NO_TRACE.is_on
    with NO_TRACE.span("a"):
        NO_TRACE.mark("m")


@given(data=st.data())
def test_what_is_handed_over_piece_by_piece_is_what_was_written(data: st.DataObject) -> None:
    theirs, ours = TraceBuffer.in_memory(64), TraceBuffer.in_memory(64)
    sender, begun = TraceSender(theirs), list[int]()
    for _ in range(data.draw(st.integers(1, 12), label="rounds")):
        for kind in data.draw(st.lists(st.sampled_from("bbem"), max_size=25), label="events"):
            if kind == "e" and begun:
                theirs.fill(begun.pop(), 9)
            elif kind == "m":
                theirs.add(record_head(TraceKind.MARK, theirs.name_number(f"mark {len(begun)}")), 0, 1)
            else:
                begun.append(theirs.add(SPAN, len(begun), 1))
        for told in sender.take():
            take_over(ours, _through_the_wire(told))
    for told in sender.take(is_last=True):
        take_over(ours, _through_the_wire(told))
    wanted, got = theirs.read(), ours.read()
    assert got.table.tolist() == wanted.table.tolist()
    assert (got.names, got.first, got.is_closed) == (wanted.names, wanted.first, True)


def test_much_at_once_is_cut_into_records_that_may_travel() -> None:
    theirs, ours = TraceBuffer.in_memory(1 << 15), TraceBuffer.in_memory(1 << 15)
    sender = TraceSender(theirs)
    numbers = [theirs.add(SPAN, number, 1) for number in range(20_000)]
    pieces = sender.take()
    for number in numbers:
        theirs.fill(number, 2)
    last = sender.take(is_last=True)
    assert len(pieces) > 1
    assert len(last) > 1
    assert [told.is_closed for told in last] == [False] * (len(last) - 1) + [True]
    assert sender.take() == []
    for told in (*pieces, *last):
        take_over(ours, _through_the_wire(told))
    assert ours.read().table.tolist() == theirs.read().table.tolist()


@pytest.mark.parametrize(
    "change",
    [{"rows": b"x" * 47}, {"filled": bytes(48)}, {"filled": bytes(48), "filled_numbers": np.int64(-1).tobytes()}, {"filled": bytes(1)}],
    ids=["rows cut", "no numbers", "number below 0", "filled cut"],
)
def test_a_piece_that_makes_no_sense_is_refused(change: dict[str, bytes]) -> None:
    sound = TraceEvents(first=5, rows=b"", filled_numbers=b"", filled=b"", names=())
    with pytest.raises(BadFrameError, match="of a trace"):
        take_over(TraceBuffer.in_memory(64), replace(sound, **change))  # type: ignore[arg-type]  # of bytes fields


def _through_the_wire(told: TraceEvents) -> TraceEvents:
    record = unpack_record(pack_record(told))
    assert isinstance(record, TraceEvents)
    return record
