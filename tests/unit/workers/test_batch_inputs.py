"""The inputs of a step against loops over every token of a plain-Python batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.batches import PlainBatch

from zspmd.workers.batch_inputs import StepInputs, build_inputs
from zspmd.workers.batch_state import BatchState


def kv_slots(batch: PlainBatch, slot: int, stop: int) -> list[int]:
    blocks, size = batch.sequences[slot].blocks, batch.block_size
    return [blocks[position // size] * size + position % size for position in range(stop)]


def assert_inputs(inputs: StepInputs, batch: PlainBatch) -> None:
    token_ids: list[int] = []
    positions: list[int] = []
    write_slots: list[int] = []
    sampled_rows: list[int] = []
    at = 0
    for slot, start, count in batch.rows:
        sequence = batch.sequences[slot]
        token_ids += sequence.tokens[start : start + count]
        positions += range(start, start + count)
        write_slots += kv_slots(batch, slot, start + count)[start:]
        at += count
        if start + count == len(sequence.tokens):
            sampled_rows.append(at - 1)
    attention = inputs.attention
    assert inputs.token_ids.tolist() == token_ids
    assert attention.positions.tolist() == positions
    assert attention.write_slots.tolist() == write_slots
    assert inputs.sampled_rows.tolist() == sampled_rows
    assert inputs.sampled_slots.tolist() == batch.sampled_slots()
    assert_contexts(inputs, batch)
    tensors = (inputs.token_ids, inputs.sampled_rows, attention.positions, attention.write_slots)
    assert {x.dtype for x in (*tensors, attention.decode_read_slots, attention.decode_lengths)} == {torch.int64}


def assert_contexts(inputs: StepInputs, batch: PlainBatch) -> None:
    attention, at = inputs.attention, 0
    assert len(attention.chunks) == batch.num_chunks
    for chunk, (slot, start, count) in zip(attention.chunks, batch.rows):
        assert (chunk.start, chunk.num_tokens) == (at, count)
        assert chunk.read_slots.tolist() == kv_slots(batch, slot, start + count)
        at += count
    assert attention.decode_start == at
    decodes = batch.rows[batch.num_chunks :]
    lengths = [start + 1 for _, start, _ in decodes]
    width = max(lengths, default=0)
    assert attention.decode_lengths.tolist() == lengths
    assert attention.decode_read_slots.shape == (len(decodes), width)
    expected = [kv_slots(batch, slot, start + 1) + [0] * (width - start - 1) for slot, start, _ in decodes]
    assert attention.decode_read_slots.tolist() == expected


@pytest.mark.parametrize("block_size", [1, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_inputs_equal_loops_over_a_plain_batch(seed: int, block_size: int) -> None:
    batch = PlainBatch(seed, block_size=block_size)
    state = BatchState(batch.max_num_seqs, batch.max_model_len, batch.block_size, batch.num_blocks)
    kinds = set()
    for _ in range(100):
        rows = state.apply(batch.next_step())
        assert_inputs(build_inputs(state, rows, torch.device("cpu")), batch)
        kinds.add((batch.num_chunks > 0, len(batch.rows) > batch.num_chunks))
        sampled = {slot: batch.random.randrange(batch.vocab_size) for slot in batch.sampled_slots()}
        state.mark_computed(rows)
        state.append_sampled(np.array(list(sampled), np.int64), np.array(list(sampled.values()), np.int32))
        batch.finish_step(sampled)
    assert len(kinds) == 4  # chunks alone, decodes alone, both and neither were seen
