"""The packed batch step: round trips, sizes, and what is refused. tests/property/test_codec.py mutates it."""

from __future__ import annotations

from dataclasses import fields, replace

import msgpack
import numpy as np
import pytest

from zspmd.errors import BadFrameError
from zspmd.transport.batch import (
    COSTS,
    DECODE_COUNTS,
    DECODE_TOKENS,
    FIXED,
    MAX_DRAFTS,
    SAME_BATCHES,
    SAME_DECODE,
    BatchStep,
    SlotAdd,
    decode_batch_step,
    encode_batch_step,
)
from zspmd.transport.step_cost import StepCost

ADD = SlotAdd(
    slot=65_535,
    tokens=np.array([1, 2, 1 << 30], np.int32),
    num_prompt=2,
    num_computed=1,
    blocks=np.array([7, (1 << 32) - 1], np.uint32),
    seed=(1 << 63) - 1,
    temperature=0.5,
    top_k=40,
    top_p=0.9,
    min_p=0.1,
    repetition_penalty=1.5,
    presence_penalty=-2.0,
    frequency_penalty=2.0,
    logprobs=5,
    min_tokens=3,
    end_token_ids=np.array([257], np.int32),
    max_num_tokens=(1 << 31) - 1,
)
SOME_COSTS = (StepCost(0, 0, 1), StepCost(5, 255, (1 << 32) - 1))
FULL = BatchStep(
    deletes=[0, 9, 65_535],
    adds=[ADD, replace(ADD, slot=1, tokens=ADD.tokens[:1], blocks=ADD.blocks[:0])],
    block_slots=np.array([3, 4, 5], np.uint16),
    block_ids=np.array([1, (1 << 32) - 1, 0], np.uint32),
    chunk_slots=np.array([1], np.uint16),
    chunk_tokens=np.array([70_000], np.uint32),
    decode_slots=np.array([5, 3], np.uint16),
)

SEVERAL = replace(FULL, decode_tokens=np.array([0, (1 << 31) - 1, 7], np.int32), decode_counts=np.array([1, 2], np.uint8))


def plain(value: object) -> object:
    """Return a step or an addition as nested lists, to be compared."""
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tolist())
    if isinstance(value, (BatchStep, SlotAdd)):
        return [(f.name, plain(getattr(value, f.name))) for f in fields(value)]
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize(
    "step",
    [
        BatchStep(),
        BatchStep(decode_slots=np.empty(0, np.uint16)),
        FULL,
        replace(FULL, adds=()),
        replace(FULL, decode_slots=None),
        replace(FULL, decode_tokens=np.array([0, (1 << 31) - 1], np.int32)),
        BatchStep(decode_slots=np.empty(0, np.uint16), decode_tokens=np.empty(0, np.int32)),
        SEVERAL,
        replace(SEVERAL, max_drafts=MAX_DRAFTS, costs=SOME_COSTS),
        replace(FULL, adds=(), costs=SOME_COSTS[:1]),
        BatchStep(costs=SOME_COSTS, max_drafts=1),
    ],
    ids=[
        "nothing",
        "no decodes",
        "everything",
        "no adds",
        "same decodes",
        "with tokens",
        "no decodes, with tokens",
        "with several tokens",
        "with several tokens and costs",
        "with costs, no adds",
        "costs alone",
    ],
)
def test_a_step_comes_back(step: BatchStep) -> None:
    data = encode_batch_step(step)
    assert plain(decode_batch_step(data)) == plain(step)
    assert plain(decode_batch_step(memoryview(data))) == plain(step)


def test_an_unchanged_batch_is_its_fixed_part() -> None:
    assert len(encode_batch_step(BatchStep())) == FIXED.size == 16
    assert decode_batch_step(encode_batch_step(BatchStep())).decode_slots is None


def test_an_appended_block_has_six_bytes() -> None:
    assert len(encode_batch_step(replace(FULL, deletes=(), adds=(), chunk_slots=np.empty(0, np.uint16), decode_slots=None))) == 16 + 3 * 6


def test_arrays_are_views_of_the_message() -> None:
    data = encode_batch_step(FULL)
    step = decode_batch_step(data)
    assert np.shares_memory(step.block_ids, np.frombuffer(data, np.uint8))
    assert not step.block_ids.flags.writeable


def packed(adds: bytes) -> bytes:
    return FIXED.pack(SAME_DECODE, 0, 0, 0, 0, 0, len(adds)) + adds


def add_with(**changes: object) -> bytes:
    row = {f.name: getattr(ADD, f.name) for f in fields(SlotAdd)}
    row = {name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in row.items()}
    return packed(msgpack.packb([list({**row, **changes}.values())]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has 0 B; its fixed part alone has 16"),
        (bytes(15), "has 15 B"),
        (bytes(17), "has 17 B where its counts ask for 16"),
        (encode_batch_step(FULL)[:-1], "where its counts ask for"),
        (FIXED.pack(0, 0, 0, 0, 0, (1 << 32) - 1, 0), "where its counts ask for"),
        (FIXED.pack(DECODE_TOKENS, 0, 0, 0, 1, 0, 0) + bytes(2), "has 18 B where its counts ask for 22"),
        (FIXED.pack(DECODE_TOKENS | SAME_DECODE, 0, 0, 0, 0, 0, 0), "has flags 0x3"),
        (FIXED.pack(DECODE_COUNTS, 0, 0, 0, 0, 0, 0), "has flags 0x4"),
        (FIXED.pack(16, 0, 0, 0, 0, 0, 0), "has flags 0x10"),
        (FIXED.pack(0, MAX_DRAFTS + 1, 0, 0, 0, 0, 0), "lets a row hold 17 drafts; 16 is the most"),
        (FIXED.pack(DECODE_TOKENS | DECODE_COUNTS, 0, 0, 0, 1, 0, 0) + bytes(2), "has 18 B where its counts ask for 19 or more"),
        (FIXED.pack(DECODE_TOKENS | DECODE_COUNTS, 0, 0, 0, 1, 0, 0) + b"\0\0\2" + bytes(4), "has 23 B where its counts ask for 27"),
        (FIXED.pack(COSTS, 0, 0, 0, 0, 0, 0) + bytes(3), "has 19 B where its counts ask for 20 or more"),
        (FIXED.pack(COSTS, 0, 0, 0, 0, 0, 0) + bytes(4), "has 0 costs; it has 1 to 1024"),
        (FIXED.pack(COSTS, 0, 0, 0, 0, 0, 0) + b"\1\4\0\0", "has 1025 costs"),
        (FIXED.pack(COSTS, 0, 0, 0, 0, 0, 0) + b"\1\0\0\0" + bytes(11), "has 31 B where its counts ask for 32"),
        (packed(b"\x93\x01"), "are no msgpack list"),
        (packed(b"\x80"), "are no msgpack list"),
        (packed(msgpack.packb([1])), "are no msgpack list"),
        (packed(msgpack.packb([[1, 2]])), "a list of 2, not of the 17 fields"),
        (packed(b"\xdd\xff\xff\xff\xff"), "adds 4294967295 sequences; there are 65536 slots"),
        (packed(msgpack.packb([]) * 2), "end after 1 of 2 B"),
        (packed(msgpack.packb([msgpack.ExtType(1, b"x")])), "are no msgpack list"),
        (add_with(tokens=bytes(7)), "field tokens of an added sequence is not a whole number of 4-byte values"),
        (add_with(blocks=[1]), "field blocks"),
        (add_with(temperature="hot"), "field temperature of an added sequence is a str, not a number"),
        (add_with(top_p=True), "field top_p"),
        (add_with(seed=1 << 63), "field seed of an added sequence is 9223372036854775808, not a whole number below"),
        (add_with(slot=-2), "field slot"),
        (add_with(top_k=1.0), "field top_k"),
        (add_with(num_prompt=None), "field num_prompt"),
    ],
    ids=[
        "nothing",
        "cut fixed part",
        "bytes left over",
        "cut",
        "huge count",
        "cut tokens",
        "tokens of the same decodes",
        "counts without tokens",
        "unknown flag",
        "too many drafts",
        "cut counts",
        "cut counted tokens",
        "cut number of costs",
        "no costs",
        "too many costs",
        "cut costs",
        "cut adds",
        "adds no list",
        "an add no list",
        "fields missing",
        "more adds than slots",
        "bytes behind the adds",
        "ext type",
        "odd token bytes",
        "blocks as list",
        "text for a number",
        "bool for a number",
        "seed too large",
        "negative slot",
        "float for a whole number",
        "None",
    ],
)
def test_a_bad_step_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(BadFrameError, match=words):
        decode_batch_step(data)


@pytest.mark.parametrize("max_drafts", [0, 1, MAX_DRAFTS])
def test_the_step_that_changes_nothing_is_one_object_on_both_ends(max_drafts: int) -> None:
    data = encode_batch_step(SAME_BATCHES[max_drafts])
    assert data == encode_batch_step(BatchStep(max_drafts=max_drafts))
    assert len(data) == FIXED.size
    assert decode_batch_step(data) is decode_batch_step(memoryview(data)) is SAME_BATCHES[max_drafts]
