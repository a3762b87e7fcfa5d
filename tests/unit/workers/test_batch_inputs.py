"""The inputs of a step against loops over every token of a plain-Python batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.batches import PlainBatch

from zspmd.workers.batch_inputs import StepInputs, build_inputs
from zspmd.workers.batch_state import BatchState


def context_blocks(batch: PlainBatch, slot: int, stop: int) -> list[int]:
    return batch.sequences[slot].blocks[: -(-stop // batch.block_size)]


def assert_inputs(inputs: StepInputs, batch: PlainBatch) -> None:
    token_ids: list[int] = []
    positions: list[int] = []
    write_blocks: list[int] = []
    sampled_rows: list[int] = []
    at = 0
    for slot, start, count in batch.rows:
        sequence = batch.sequences[slot]
        token_ids += sequence.tokens[start : start + count]
        positions += range(start, start + count)
        write_blocks += [sequence.blocks[position // batch.block_size] for position in range(start, start + count)]
        at += count
        if start + count == len(sequence.tokens):
            sampled_rows.append(at - 1)
    attention = inputs.attention
    assert inputs.token_ids.tolist() == token_ids
    assert attention.positions.tolist() == positions
    assert attention.max_length == max((position + 1 for position in positions), default=0)
    assert attention.block_size == batch.block_size
    assert attention.write_blocks.tolist() == write_blocks
    assert attention.write_places.tolist() == [position % batch.block_size for position in positions]
    assert inputs.sampled_rows.tolist() == sampled_rows
    assert inputs.sampled_slots.tolist() == batch.sampled_slots()
    assert_contexts(inputs, batch)
    tensors = (inputs.token_ids, inputs.sampled_rows, attention.positions, attention.write_blocks, attention.write_places)
    assert {x.dtype for x in (*tensors, attention.decode_blocks, attention.decode_lengths)} == {torch.int64}


def assert_contexts(inputs: StepInputs, batch: PlainBatch) -> None:
    attention, at = inputs.attention, 0
    assert len(attention.chunks) == batch.num_chunks
    for chunk, (slot, start, count) in zip(attention.chunks, batch.rows):
        assert (chunk.start, chunk.num_tokens, chunk.context) == (at, count, start + count)
        assert chunk.blocks.tolist() == context_blocks(batch, slot, start + count)
        at += count
    assert attention.decode_start == at
    decodes = batch.rows[batch.num_chunks :]
    lengths = [start + 1 for _, start, _ in decodes]
    width = -(-max(lengths, default=0) // batch.block_size)
    assert attention.decode_lengths.tolist() == lengths
    assert attention.decode_blocks.shape == (len(decodes), width)
    for row, (slot, start, _) in zip(attention.decode_blocks.tolist(), decodes):
        blocks = context_blocks(batch, slot, start + 1)
        assert row[: len(blocks)] == blocks


@pytest.mark.parametrize("block_size", [1, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_inputs_equal_loops_over_a_plain_batch(seed: int, block_size: int) -> None:
    batch = PlainBatch(seed, block_size=block_size)
    state = BatchState(batch.max_num_seqs, batch.max_model_len, batch.block_size, batch.num_blocks)
    kinds, repeats = set(), 0
    before: list[tuple[int, int]] | None = None
    for _ in range(100):
        rows = state.apply(batch.next_step())
        inputs = build_inputs(state, rows, torch.device("cpu"))
        assert_inputs(inputs, batch)
        decodes = [(slot, start + 1) for slot, start, _ in batch.rows[batch.num_chunks :]]
        if inputs.attention.repeats_decodes:
            assert not batch.num_chunks
            assert decodes == before
            repeats += 1
        before = [(slot, length + 1) for slot, length in decodes]
        kinds.add((batch.num_chunks > 0, len(batch.rows) > batch.num_chunks))
        sampled = {slot: batch.random.randrange(batch.vocab_size) for slot in batch.sampled_slots()}
        state.mark_computed(rows)
        state.append_sampled(np.array(list(sampled), np.int64), np.array(list(sampled.values()), np.int32))
        batch.finish_step(sampled)
    assert repeats
    assert len(kinds) == 4  # chunks alone, decodes alone, both and neither were seen
