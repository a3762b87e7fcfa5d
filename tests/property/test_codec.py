"""The codec and the packed batch step against hostile bytes: a BadFrameError or a value, and never much memory."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zspmd.errors import BadFrameError
from zspmd.transport import codec
from zspmd.transport.batch import BatchStep, SlotAdd, decode_batch_step, encode_batch_step
from zspmd.transport.codec import TENSOR_EXT, ValueEncoder, decode_value
from zspmd.transport.records import Beat, Hello, StoreRequest, unpack_record
from zspmd.transport.schema import pack_record

MAX_EXTRA_BYTES = 1 << 20  # of memory, for inputs of a few hundred bytes
QUICK = settings(deadline=None, max_examples=150)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
dtypes = st.sampled_from([dtype for dtype in codec._DTYPES if dtype.names is None])
arrays: st.SearchStrategy[npt.NDArray[Any]] = dtypes.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=7, min_side=0, max_side=3))
)
values = st.recursive(
    scalars | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(-5, 1 << 60), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(autouse=True, scope="module")
def no_bridges() -> Any:
    """Forget the bridges that another test has registered, and afterwards those of this module."""
    before = dict(codec._bridges)
    codec._bridges.clear()
    yield
    codec._bridges.update(before)


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal, arrays by dtype, shape and bits."""
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return isinstance(right, dict) and list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and bool(left == right)


@QUICK
@given(values)
def test_any_value_comes_back(value: Any) -> None:
    body, buffers = ValueEncoder().encode(value)
    assert same(value, decode_value(body, buffers))


def decode_frugally(body: bytes, buffers: list[bytes]) -> None:
    """Decode hostile bytes; any exception but BadFrameError fails the test, and so does a large allocation."""
    tracemalloc.start()
    try:
        decode_value(body, buffers)
    except BadFrameError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MAX_EXTRA_BYTES


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200), st.lists(st.binary(max_size=40), max_size=3))
@example(b"\xdc\xff\xff" * 60, [])  # lists that say they have 65,535 items, each inside the one before
@example(b"\xdf\xff\xff\xff\xff", [])
@example(b"\xd6\xff\0\0\0\0", [])  # msgpack's own timestamp
@example(b"\xc7\x00\xff", [])
def test_random_bytes_do_no_harm(body: bytes, buffers: list[bytes]) -> None:
    decode_frugally(body, buffers)


@QUICK
@given(st.binary(max_size=60), st.lists(st.binary(max_size=16), max_size=2))
def test_random_tensor_metadata_does_no_harm(data: bytes, buffers: list[bytes]) -> None:
    decode_frugally(msgpack.packb([msgpack.ExtType(TENSOR_EXT, data)]), buffers)


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """Draw valid bytes with some of them changed, cut out or put in."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=6))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 6))]
        elif at < len(data):
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


@QUICK
@given(mutated(values.map(lambda value: ValueEncoder().encode(value)[0])))
def test_mutated_bodies_do_no_harm(body: bytes) -> None:
    decode_frugally(body, [])


def slot_arrays(dtype: Any, size: int) -> st.SearchStrategy[npt.NDArray[Any]]:
    return hnp.arrays(dtype, size, elements=st.integers(0, np.iinfo(dtype).max))


@st.composite
def slot_adds(draw: st.DrawFn) -> SlotAdd:
    tokens = draw(slot_arrays(np.int32, draw(st.integers(1, 5))))
    return SlotAdd(
        slot=draw(st.integers(0, 65_535)),
        tokens=tokens,
        num_prompt=draw(st.integers(1, len(tokens))),
        num_computed=draw(st.integers(0, len(tokens) - 1)),
        blocks=draw(slot_arrays(np.uint32, draw(st.integers(0, 3)))),
        seed=draw(st.integers(0, (1 << 63) - 1)),
        temperature=draw(st.floats(0, 100)),
        logprobs=draw(st.integers(-1, 20)),
        end_token_ids=draw(slot_arrays(np.int32, draw(st.integers(0, 2)))),
    )


@st.composite
def batch_steps(draw: st.DrawFn) -> BatchStep:
    num_blocks, num_chunks = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    return BatchStep(
        deletes=draw(st.lists(st.integers(0, 65_535), max_size=4)),
        adds=draw(st.lists(slot_adds(), max_size=2)),
        block_slots=draw(slot_arrays(np.uint16, num_blocks)),
        block_ids=draw(slot_arrays(np.uint32, num_blocks)),
        chunk_slots=draw(slot_arrays(np.uint16, num_chunks)),
        chunk_tokens=draw(slot_arrays(np.uint32, num_chunks)),
        decode_slots=draw(st.none() | slot_arrays(np.uint16, draw(st.integers(0, 4)))),
    )


def plain(value: Any) -> Any:
    """Return a step as nested lists, to be compared."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, (BatchStep, SlotAdd)):
        return [plain(getattr(value, name)) for name in value.__dataclass_fields__]
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@QUICK
@given(batch_steps())
def test_any_batch_step_comes_back(step: BatchStep) -> None:
    assert plain(decode_batch_step(encode_batch_step(step))) == plain(step)


@QUICK
@given(st.binary(max_size=80) | mutated(batch_steps().map(encode_batch_step)))
def test_a_hostile_batch_step_is_read_or_refused(data: bytes) -> None:
    try:
        step = decode_batch_step(data)
    except BadFrameError:
        return
    assert all(isinstance(add, SlotAdd) and math.isfinite(add.slot) for add in step.adds)


records = st.sampled_from(
    [
        pack_record(Beat(phase="idle", seq=1, done_seq=1, step_id=0, memory_bytes=5)),
        pack_record(Hello(token=b"t", rank=1, pid=2, host="h", version="1", purpose="rank")),
        pack_record(StoreRequest(request_id=1, op="wait", keys=("a", "b"), timeout_s=1.5)),
    ]
)


@QUICK
@given(st.binary(max_size=80) | mutated(records))
def test_a_hostile_record_is_read_or_refused(data: bytes) -> None:
    try:
        record = unpack_record(data)
    except BadFrameError:
        return
    assert unpack_record(pack_record(record)) == record
