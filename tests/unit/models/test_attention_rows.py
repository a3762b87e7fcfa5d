"""Decode rows of several tokens, as verification of drafts has them, against the formula: each token sees what stands before it.

Rows are ragged, go on behind what was accepted, and write anew what was refused.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zspmd.models.attention import KvLayer, PagedAttention
from zspmd.transport.batch import BatchStep, SlotAdd
from zspmd.workers.batch_inputs import build_inputs
from zspmd.workers.batch_state import BatchState, StepRows

CPU = torch.device("cpu")
HEAD_DIM, BLOCK_SIZE, NUM_SLOTS, LENGTH = 8, 4, 4, 96
NUM_STEPS = 8
MOST_TOKENS = 5


@dataclass
class Sequences:
    """Random queries, keys and values by slot and position, and one layer that attends from some of them in each step."""

    num_heads: int
    num_kv_heads: int
    window: int | None
    dtype: torch.dtype
    chance: random.Random = field(default_factory=lambda: random.Random(4))

    def __post_init__(self) -> None:
        self.generator = generator = torch.Generator().manual_seed(7)
        self.queries = torch.randn(NUM_SLOTS, LENGTH, self.num_heads, HEAD_DIM, generator=generator).to(self.dtype)
        self.keys_values = torch.randn(NUM_SLOTS, LENGTH, 2 * self.num_kv_heads, HEAD_DIM, generator=generator).to(self.dtype)
        sizes: dict[str, Any] = {"dtype": self.dtype, "device": CPU}
        self.attention = PagedAttention(self.num_heads, self.num_kv_heads, HEAD_DIM, 1, sliding_window=self.window, **sizes)
        num_blocks = 1 + NUM_SLOTS * LENGTH // BLOCK_SIZE
        self.layer = KvLayer(num_blocks, self.num_kv_heads, BLOCK_SIZE, HEAD_DIM, **sizes)
        self.state = BatchState(NUM_SLOTS, LENGTH, BLOCK_SIZE, num_blocks)
        blocks = np.array(self.chance.sample(range(1, num_blocks), num_blocks - 1), np.uint32).reshape(NUM_SLOTS, -1)
        self.state.apply(BatchStep(adds=[SlotAdd(slot, np.zeros(2, np.int32), 2, 0, blocks[slot]) for slot in range(NUM_SLOTS)]))

    def attend(self, spans: list[tuple[int, int, int]], num_chunks: int, *, repeats: bool) -> Tensor:
        """Return what a step with these rows (slot, start, end) gives, float64 [T, H * E]."""
        slots, starts, ends = np.array(spans, np.int64).T
        rows = StepRows(slots, starts, ends - starts, ends, num_chunks, repeats)
        inputs = build_inputs(self.state, rows, CPU).attention
        queries = torch.cat([self.queries[slot, start:end] for slot, start, end in spans])
        keys_values = torch.cat([self.keys_values[slot, start:end] for slot, start, end in spans])
        return self.attention.begin_step(inputs)(queries, keys_values, self.layer).double()

    def expect(self, spans: list[tuple[int, int, int]]) -> Tensor:
        """Return the same by the formula."""
        return torch.stack([self._expect_one(slot, place) for slot, start, end in spans for place in range(start, end)])

    def rewrite(self, slot: int, start: int, end: int) -> None:
        """Have other tokens stand there."""
        for table in (self.queries, self.keys_values):
            table[slot, start:end] = torch.randn(table[slot, start:end].shape, generator=self.generator).to(self.dtype)

    def _expect_one(self, slot: int, place: int) -> Tensor:
        first = 0 if self.window is None else max(0, place + 1 - self.window)
        keys, values = self.keys_values[slot, first : place + 1].double().transpose(0, 1).chunk(2)  # [K, C, E]
        groups = self.queries[slot, place].double().view(self.num_kv_heads, -1, HEAD_DIM)
        seen: Tensor = ((groups @ keys.transpose(1, 2) * HEAD_DIM**-0.5).softmax(-1) @ values).flatten()
        return seen


def check_steps(sequences: Sequences, *, repeats: bool, with_chunks: bool, overwrites_cache: bool = False) -> None:
    decodes = [2, 0, 1] if with_chunks else [2, 0, 1, 3]
    lengths = {slot: sequences.chance.randint(3, 30) for slot in range(NUM_SLOTS)}
    sequences.attend([(slot, 0, length) for slot, length in lengths.items()], NUM_SLOTS, repeats=False)
    tolerance = 1e-5 if sequences.dtype == torch.float32 else 2e-2
    for number in range(NUM_STEPS):
        counts = [sequences.chance.randint(1, MOST_TOKENS) if number % 4 else 1 for _ in decodes]
        spans = [(slot, lengths[slot], lengths[slot] + count) for slot, count in zip(decodes, counts, strict=True)]
        spans = ([(3, lengths[3], lengths[3] + 3)] if with_chunks else []) + spans
        for span in spans:
            sequences.rewrite(*span)
        out = sequences.attend(spans, int(with_chunks), repeats=repeats and number > 0)
        torch.testing.assert_close(out, sequences.expect(spans), atol=tolerance, rtol=0)
        if overwrites_cache:
            sequences.layer.cache.fill_(100.0)  # what was gathered is not read again
        for slot, start, end in spans:
            lengths[slot] += sequences.chance.randint(1, end - start) if slot in decodes else 3


@pytest.mark.parametrize("repeats", [False, True], ids=["gathered", "kept"])
@pytest.mark.parametrize("window", [None, 1, 7], ids="window-{}".format)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_token_sees_what_stands_before_it(
    num_heads: int, num_kv_heads: int, window: int | None, dtype: torch.dtype, repeats: bool
) -> None:
    check_steps(Sequences(num_heads, num_kv_heads, window, dtype), repeats=repeats, with_chunks=False)


@pytest.mark.parametrize("window", [None, 5], ids="window-{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_several_tokens_stand_beside_chunks(window: int | None, dtype: torch.dtype) -> None:
    check_steps(Sequences(6, 2, window, dtype), repeats=False, with_chunks=True)


def test_kept_contexts_are_not_gathered_again() -> None:
    check_steps(Sequences(6, 2, None, torch.float32), repeats=True, with_chunks=False, overwrites_cache=True)


def test_one_row_of_several_tokens_equals_these_one_at_a_time() -> None:
    together, single = Sequences(6, 2, 9, torch.float32), Sequences(6, 2, 9, torch.float32)
    for sequences in (together, single):
        sequences.attend([(1, 0, 13)], 1, repeats=False)
    out = together.attend([(1, 13, 18)], 0, repeats=False)
    one_by_one = [single.attend([(1, place, place + 1)], 0, repeats=place > 13) for place in range(13, 18)]
    torch.testing.assert_close(out, torch.cat(one_by_one), atol=1e-6, rtol=0)
