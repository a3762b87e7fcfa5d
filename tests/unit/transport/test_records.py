"""Control records: round trips, and every field's type and bounds."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import Any

import msgpack
import pytest

from zspmd.errors import BadFrameError
from zspmd.transport.records import (
    MAX_RECORD_BYTES,
    Accepted,
    Beat,
    Bootstrap,
    ControlRecord,
    Failure,
    Hello,
    Progress,
    Reject,
    StoreReply,
    StoreRequest,
    TraceEvents,
    Welcome,
    unpack_record,
)
from zspmd.transport.schema import pack_record

SAMPLES: list[ControlRecord] = [
    Bootstrap(launch_id="a", control_endpoint="ipc://x", token=b"t"),
    Hello(token=b"t", rank=1, pid=2, host="h", version="1", purpose="rank"),
    Welcome(
        epoch=1,
        step_endpoint="s",
        result_endpoint="r",
        worker="m:C",
        main_path="",
        output_ranks=(0, 1),
        tp=2,
        pp=1,
        dp=1,
        ep=1,
        device="cpu",
        communicator="auto",
        beat_s=1.0,
        collective_s=2.5,
    ),
    Accepted(),
    Reject(reason="no"),
    Beat(phase="idle", seq=-1, done_seq=-1, step_id=-1, memory_bytes=5),
    Progress(done=1, total=2, what="weights"),
    TraceEvents(first=1, rows=b"r", filled_numbers=b"n", filled=b"f", names=("span",), num_unnamed=1, is_closed=True),
    StoreRequest(request_id=1, op="set", keys=("k",), value=b"v"),
    StoreReply(request_id=1, value=b"v", amount=-3, absent=("k",), error="e"),
    Failure(exception_type="E", message="m", traceback="t", phase="step", step_id=0),
]
FIELDS = [(record, field) for record in SAMPLES for field in fields(record)]  # type: ignore[arg-type]  # each is a dataclass
FIELD_IDS = [f"{type(record).__name__}.{field.name}" for record, field in FIELDS]


def values_of(record: ControlRecord) -> dict[str, Any]:
    return {"record": type(record).__name__, **{f.name: getattr(record, f.name) for f in fields(record)}}  # type: ignore[arg-type]  # as above


def test_every_record_has_a_sample() -> None:
    assert {type(sample).__name__ for sample in SAMPLES} == set(ControlRecord.kinds)


@pytest.mark.parametrize("record", SAMPLES, ids=lambda record: type(record).__name__)
def test_a_record_comes_back(record: ControlRecord) -> None:
    assert unpack_record(pack_record(record)) == record
    assert unpack_record(msgpack.packb(values_of(record))) == record


def beyond(field: Any) -> list[Any]:
    """Return values of the right type just outside a field's bounds."""
    kind, high = field.metadata["type"], field.metadata.get("high")
    if kind is int:
        return [value for value in (field.metadata["low"] - 1, high + 1) if -(1 << 63) <= value < 1 << 64]
    if kind is tuple:
        item = field.metadata["item"]
        return [[item()] * (high + 1), [item(), None]]
    if kind is bool:
        return [0, 1, 1.0]
    return [math.nan, math.inf, -math.inf] if kind is float else [kind(b"x" * (high + 1)) if kind is bytes else "x" * (high + 1)]


def within(field: Any) -> list[Any]:
    """Return values just inside a field's bounds."""
    kind, high = field.metadata["type"], field.metadata.get("high")
    if kind is int:
        return [field.metadata["low"], high]
    if kind is bool:
        return [False, True]
    if kind is tuple:
        return [(), (field.metadata["item"](),) * high]
    return [0.0, 3] if kind is float else [kind(), b"x" * high if kind is bytes else "x" * high]


@pytest.mark.parametrize(("record", "field"), FIELDS, ids=FIELD_IDS)
def test_a_field_at_its_bounds_is_taken(record: ControlRecord, field: Any) -> None:
    for value in within(field):
        back = unpack_record(msgpack.packb({**values_of(record), field.name: value}))
        assert getattr(back, field.name) == value


@pytest.mark.parametrize(("record", "field"), FIELDS, ids=FIELD_IDS)
def test_a_field_beyond_its_bounds_is_refused_by_name(record: ControlRecord, field: Any) -> None:
    wrong_type: list[object] = [None, {}, "text" if field.metadata["type"] is not str else b"bytes"]
    if field.metadata["type"] is not bool:
        wrong_type.append(True)
    for value in [*beyond(field), *wrong_type]:
        with pytest.raises(BadFrameError, match=f"{type(record).__name__}.{field.name} "):
            unpack_record(msgpack.packb({**values_of(record), field.name: value}))


@pytest.mark.parametrize(("record", "field"), FIELDS, ids=FIELD_IDS)
def test_a_missing_field_is_refused_unless_it_has_a_default(record: ControlRecord, field: Any) -> None:
    values = values_of(record)
    del values[field.name]
    if field.default is not MISSING:
        assert getattr(unpack_record(msgpack.packb(values)), field.name) == field.default
    else:
        with pytest.raises(BadFrameError, match=f"{type(record).__name__} lacks the field {field.name}"):
            unpack_record(msgpack.packb(values))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no msgpack map"),
        (b"\x81\xa6rec", "no msgpack map"),
        (msgpack.packb([1]), "is not a map"),
        (msgpack.packb({"a": 1}), "unknown record None"),
        (msgpack.packb({"record": "Exec"}), "unknown record 'Exec'; known are Accepted, "),
        (msgpack.packb({"record": ["Accepted"]}), "no msgpack map"),
        (msgpack.packb({"record": "Accepted", "x": 1}), "Accepted has unknown fields, or one twice: 'x'"),
        (b"\x83" + b"".join(map(msgpack.packb, ["record", "Reject", "reason", "a", "reason", "b"])), "or one twice: 'reason'"),
        (msgpack.packb({"record": "Accepted", b"x": 1}), "unknown fields"),
        (msgpack.packb({"record": "Accepted", 5: 1}), "unknown fields"),
        (msgpack.packb({"record": msgpack.ExtType(1, b"x")}), "no msgpack map"),
        (msgpack.packb({str(i): i for i in range(65)}), "not a map of at most 64"),
        (b"\x91" * 3000, "not a map"),
        (msgpack.packb({"record": "Reject", "reason": [1]}), r"Reject\.reason is not a str"),
        (msgpack.packb({"record": "Accepted"}) + b"\0", "a record ends after 17 of 18 B"),
        (bytes(MAX_RECORD_BYTES + 1), f"the limit is {MAX_RECORD_BYTES}"),
    ],
    ids=[
        "empty",
        "cut",
        "a list",
        "nameless",
        "unknown",
        "a list as name",
        "unknown field",
        "a field twice",
        "bytes field",
        "int field",
        "ext type",
        "too many fields",
        "too deep",
        "a list for a text",
        "bytes left over",
        "too large",
    ],
)
def test_what_is_no_record_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadFrameError, match=words):
        unpack_record(data)


def test_a_sender_finds_its_own_mistakes() -> None:
    with pytest.raises(BadFrameError, match=r"Progress\.done is -1, outside 0 to"):
        pack_record(Progress(done=-1, total=1, what=""))
    keys = ("k" * 1000,) * 4096
    with pytest.raises(BadFrameError, match=f"StoreRequest packs to .* B; the limit is {MAX_RECORD_BYTES}"):
        pack_record(StoreRequest(request_id=1, op="wait", keys=keys))
