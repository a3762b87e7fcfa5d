"""Runs sequences through one rank's model over a paged cache: the inputs of each step built the plain way, one token at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from zspmd.models.attention import AttentionInputs, ChunkSpan
from zspmd.models.llama import LlamaModel


class PagedSequences:
    """The block tables and computed counts of some sequences; blocks are handed out in a shuffled order.

    Args:
        num_sequences: how many sequences there are.
        max_tokens: the most tokens of any.
        block_size: positions in a block.
        seed: of the order of the blocks. Block 0 is never handed out.
    """

    def __init__(self, num_sequences: int, *, max_tokens: int, block_size: int = 4, seed: int = 0) -> None:
        blocks_each = -(-max_tokens // block_size)
        self.num_blocks = 1 + num_sequences * blocks_each
        self.block_size = block_size
        order = random.Random(seed).sample(range(1, self.num_blocks), self.num_blocks - 1)
        self.tables = [order[i * blocks_each : (i + 1) * blocks_each] for i in range(num_sequences)]
        self.computed = [0] * num_sequences

    def slots(self, sequence: int, start: int, stop: int) -> list[int]:
        """Return the flat KV slots of positions [start, stop)."""
        table, size = self.tables[sequence], self.block_size
        return [table[i // size] * size + i % size for i in range(start, stop)]

    def build_inputs(self, chunks: Sequence[tuple[int, int]], decodes: Sequence[int]) -> AttentionInputs:
        """Return the inputs of a step: (sequence, tokens) for each chunk, and the sequences that decode one token."""
        positions: list[int] = []
        write_slots: list[int] = []
        spans, start = [], 0
        for sequence, count in [*chunks, *((sequence, 1) for sequence in decodes)]:
            first = self.computed[sequence]
            positions += range(first, first + count)
            write_slots += self.slots(sequence, first, first + count)
        for sequence, count in chunks:
            stop = self.computed[sequence] + count
            spans.append(ChunkSpan(start, count, torch.tensor(self.slots(sequence, 0, stop))))
            start += count
        lengths = [self.computed[sequence] + 1 for sequence in decodes]
        reads = torch.zeros(len(decodes), max(lengths, default=0), dtype=torch.int64)
        for row, (sequence, length) in enumerate(zip(decodes, lengths)):
            reads[row, :length] = torch.tensor(self.slots(sequence, 0, length))
        return AttentionInputs(
            positions=torch.tensor(positions),
            write_slots=torch.tensor(write_slots),
            chunks=tuple(spans),
            decode_start=start,
            decode_read_slots=reads,
            decode_lengths=torch.tensor(lengths, dtype=torch.int64),
        )


def run_step(
    model: LlamaModel,
    pages: PagedSequences,
    cache: Sequence[Tensor],
    tokens: Sequence[Sequence[int]],
    chunks: Sequence[tuple[int, int]],
    decodes: Sequence[int],
) -> list[tuple[int, int, Tensor]]:
    """Compute one step and return (sequence, position, this rank's logits [V_local]) for each of its rows, in order."""
    inputs = pages.build_inputs(chunks, decodes)
    rows = [(s, pages.computed[s] + i) for s, count in [*chunks, *((s, 1) for s in decodes)] for i in range(count)]
    token_ids = torch.tensor([tokens[s][position] for s, position in rows])
    logits = model.compute_logits(model(token_ids, inputs, cache))
    for sequence, count in [*chunks, *((s, 1) for s in decodes)]:
        pages.computed[sequence] += count
    return [(s, position, row) for (s, position), row in zip(rows, logits)]
