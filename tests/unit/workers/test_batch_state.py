"""The batch state against a plain-Python batch, and every contradiction that a step may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from support.batches import PlainBatch

from zspmd.errors import BadFrameError, InternalError
from zspmd.transport.batch import BatchStep, SlotAdd
from zspmd.workers.batch_state import BatchState


def make_state(batch: PlainBatch) -> BatchState:
    return BatchState(batch.max_num_seqs, batch.max_model_len, batch.block_size, batch.num_blocks)


def assert_same(state: BatchState, batch: PlainBatch) -> None:
    assert np.flatnonzero(state.is_live).tolist() == sorted(batch.sequences)
    for slot, sequence in batch.sequences.items():
        assert state.tokens[slot, : state.num_tokens[slot]].tolist() == sequence.tokens
        assert state.num_prompt[slot] == sequence.num_prompt
        assert state.num_computed[slot] == sequence.num_computed
        assert state.block_counts[slot] == len(sequence.blocks)
        padding = [0] * (state.block_table.shape[1] - len(sequence.blocks))
        assert state.block_table[slot].tolist() == sequence.blocks + padding
        assert state.end_token_ids[slot].tolist() == sequence.add.end_token_ids.tolist()
        for name in {field.name for field in fields(SlotAdd)} & set(state.sampling.dtype.names or ()):
            assert state.sampling[slot][name] == getattr(sequence.add, name), name


@pytest.mark.parametrize("seed", range(8))
def test_state_follows_a_plain_batch_through_random_steps(seed: int) -> None:
    batch = PlainBatch(seed)
    state = make_state(batch)
    num_sampled = num_same = 0
    for _ in range(200):
        step = batch.next_step()
        rows = state.apply(step)
        num_same += step.decode_slots is None
        assert_same(state, batch)
        assert list(zip(rows.slots.tolist(), rows.starts.tolist(), rows.num_tokens.tolist())) == batch.rows
        assert rows.num_chunks == batch.num_chunks
        sampled = {slot: batch.random.randrange(batch.vocab_size) for slot in batch.sampled_slots()}
        state.mark_computed(rows)
        state.append_sampled(np.array(list(sampled), np.int64), np.array(list(sampled.values()), np.int32))
        batch.finish_step(sampled)
        assert_same(state, batch)
        num_sampled += len(sampled)
    assert num_sampled > 100
    assert num_same > 5


def u16(*values: int) -> Any:
    return np.array(values, np.uint16)


def i32(*values: int) -> Any:
    return np.array(values, np.int32)


def u32(*values: int) -> Any:
    return np.array(values, np.uint32)


def make_add(slot: int = 0, *, tokens: int = 5, num_prompt: int | None = None, num_computed: int = 0, blocks: Any = (1, 2)) -> SlotAdd:
    return SlotAdd(slot, np.arange(tokens, dtype=np.int32), tokens if num_prompt is None else num_prompt, num_computed, u32(*blocks))


def make_step(**changes: Any) -> BatchStep:
    return BatchStep(**{"decode_slots": u16(), **changes})


# Each starts from 4 slots, sequences of 12 tokens, 8 blocks of 4, and slot 0 with 5 tokens in blocks 1 and 2.
CONTRADICTIONS: dict[str, tuple[BatchStep, type[Exception], str]] = {
    "delete-of-a-free-slot": (make_step(deletes=[1]), InternalError, "delete of slot 1, which no sequence holds"),
    "delete-outside": (make_step(deletes=[4]), BadFrameError, "slot 4; this batch has slots 0 to 3"),
    "add-to-a-live-slot": (make_step(adds=[make_add(0)]), InternalError, "slot 0, which a sequence of 5 tokens still holds"),
    "add-outside": (make_step(adds=[make_add(9)]), BadFrameError, "add slot 9"),
    "add-too-long": (make_step(adds=[make_add(1, tokens=13, blocks=())]), InternalError, "13 prompt tokens of 13.*room for 12"),
    "add-of-nothing": (make_step(adds=[make_add(1, tokens=0)]), InternalError, "0 prompt tokens of 0"),
    "add-more-prompt-than-tokens": (make_step(adds=[make_add(1, num_prompt=6)]), InternalError, "6 prompt tokens of 5"),
    "add-all-computed": (make_step(adds=[make_add(1, num_computed=5)]), InternalError, "5 of 5 tokens computed"),
    "add-computed-without-blocks": (make_step(adds=[make_add(1, num_computed=4, blocks=())]), InternalError, "4 of 5 .* in 0 blocks of 4"),
    "add-too-many-blocks": (make_step(adds=[make_add(1, blocks=(3, 4, 5, 6))]), InternalError, "slot 1 gets more than the 3 blocks"),
    "block-for-a-free-slot": (make_step(block_slots=u16(2), block_ids=u32(3)), InternalError, "block for slot 2"),
    "block-reserved": (make_step(block_slots=u16(0), block_ids=u32(0)), BadFrameError, "block 0 is outside the pool; blocks 1 to 7"),
    "block-outside": (make_step(block_slots=u16(0), block_ids=u32(8)), BadFrameError, "block 8 is outside the pool"),
    "table-overflow": (make_step(block_slots=u16(0, 0), block_ids=u32(3, 4)), InternalError, "slot 0 gets more than the 3 blocks"),
    "chunk-of-a-free-slot": (make_step(chunk_slots=u16(3), chunk_tokens=u32(1)), InternalError, "chunk of slot 3"),
    "chunk-of-nothing": (make_step(chunk_slots=u16(0), chunk_tokens=u32(0)), BadFrameError, "chunk of slot 0 has 0 tokens"),
    "chunk-beyond-known": (
        make_step(chunk_slots=u16(0), chunk_tokens=u32(6)),
        InternalError,
        "positions 0 to 5, but only 5 tokens are known",
    ),
    "chunk-beyond-blocks": (
        make_step(deletes=[0], adds=[make_add(0, blocks=(1,))], chunk_slots=u16(0), chunk_tokens=u32(5)),
        InternalError,
        "positions 0 to 4, but its 1 blocks of 4 hold 4",
    ),
    "decode-of-a-free-slot": (make_step(decode_slots=u16(2)), InternalError, "decode of slot 2, which no sequence holds"),
    "decode-outside": (make_step(decode_slots=u16(4)), BadFrameError, "row for slot 4"),
    "decode-twice": (make_step(decode_slots=u16(0, 0)), InternalError, "slot 0 has 2 rows in one step"),
    "chunk-and-decode": (make_step(chunk_slots=u16(0), chunk_tokens=u32(1), decode_slots=u16(0)), InternalError, "slot 0 has 2 rows"),
    "token-for-a-free-slot": (make_step(decode_slots=u16(2), decode_tokens=i32(7)), InternalError, r"tokens for the slots \[2\]"),
    "token-outside": (make_step(decode_slots=u16(4), decode_tokens=i32(7)), BadFrameError, "token for slot 4"),
    "token-twice": (make_step(decode_slots=u16(0, 0), decode_tokens=i32(7, 7)), InternalError, r"tokens for the slots \[0, 0\]"),
    "token-too-soon": (
        make_step(decode_slots=u16(0), decode_tokens=i32(7)),
        InternalError,
        "a token for slot 0, of which 0 of 5 known tokens are computed",
    ),
    "same-decode-after-delete": (
        make_step(deletes=[0], decode_slots=None),
        InternalError,
        "decode of slot 0, which no sequence holds",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradicting_step_is_refused_with_slot_and_numbers(name: str) -> None:
    bad, error, message = CONTRADICTIONS[name]
    state = BatchState(4, 12, 4, 8)
    state.apply(make_step(adds=[make_add(0)], decode_slots=u16(0)))
    with pytest.raises(error, match=message):
        state.apply(bad)


def test_same_decode_slots_before_any_are_none() -> None:
    assert len(BatchState(4, 12, 4, 8).apply(BatchStep()).slots) == 0


def decoding_state(append: Callable[[BatchState], None]) -> BatchState:
    """Slot 0 with its 5 tokens computed, and then ``append``."""
    state = BatchState(4, 12, 4, 8)
    state.mark_computed(state.apply(make_step(adds=[make_add(0)], chunk_slots=u16(0), chunk_tokens=u32(5))))
    append(state)
    return state


def test_decode_needs_the_sampled_token() -> None:
    unsampled = decoding_state(lambda state: None)
    with pytest.raises(InternalError, match="decode of slot 0 computes positions 5 to 5, but only 5 tokens are known"):
        unsampled.apply(make_step(decode_slots=u16(0)))
    sampled = decoding_state(lambda state: state.append_sampled(np.array([0]), np.array([9], np.int32)))
    assert sampled.apply(make_step(decode_slots=u16(0))).starts.tolist() == [5]


def test_a_told_token_is_one_that_a_rank_has_sampled() -> None:
    told = decoding_state(lambda state: None)
    sampled = decoding_state(lambda state: state.append_sampled(np.array([0]), i32(9)))
    steps = make_step(decode_slots=u16(0), decode_tokens=i32(9)), make_step(decode_slots=u16(0))
    assert told.apply(steps[0]).starts.tolist() == sampled.apply(steps[1]).starts.tolist() == [5]
    assert told.tokens[0].tolist() == sampled.tokens[0].tolist()
    assert told.num_tokens.tolist() == sampled.num_tokens.tolist()


def test_full_slot_takes_no_further_token() -> None:
    state = decoding_state(lambda state: None)
    for token in range(8):  # 12 tokens may be computed, and the 13th is the last to be sampled
        state.append_sampled(np.array([0]), np.array([token], np.int32))
    with pytest.raises(InternalError, match="slot 0 holds 13 tokens"):
        state.append_sampled(np.array([0]), np.array([1], np.int32))


def full_state(*, may_be_full: bool) -> BatchState:
    """A sequence of the five tokens that it may have, four of them computed, in a block of four."""
    state = BatchState(4, 12, 4, 8, may_be_full=may_be_full)
    state.apply(make_step(adds=[replace(make_add(0, tokens=4, blocks=(1,)), max_num_tokens=5)], chunk_slots=u16(0), chunk_tokens=u32(4)))
    state.num_computed[0] = 4
    state.append_sampled(np.array([0]), i32(9))
    return state


def test_a_full_sequence_may_have_a_row_without_a_block_only_where_drafts_are_in_flight() -> None:
    step = make_step(decode_slots=u16(0))
    assert full_state(may_be_full=True).apply(step).slots.tolist() == [0]
    with pytest.raises(InternalError, match="its 1 blocks of 4 hold 4"):
        full_state(may_be_full=False).apply(step)


def test_deleted_slot_is_free_for_an_add_of_the_same_step() -> None:
    state = BatchState(4, 12, 4, 8)
    state.apply(make_step(adds=[make_add(0)]))
    state.apply(make_step(deletes=[0], adds=[make_add(0, tokens=3, blocks=(4,))]))
    assert state.num_tokens[0] == 3
    assert state.block_table[0].tolist() == [4, 0, 0]
