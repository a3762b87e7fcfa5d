"""Runs sequences through one rank's model over a paged cache: the inputs of each step built the plain way, one token at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from zspmd.models.attention import AttentionInputs, ChunkSpan, KvLayer
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
        self._decoded: list[tuple[int, int]] = []  # sequences and lengths of the step before

    def slots(self, sequence: int, start: int, stop: int) -> list[int]:
        """Return the flat KV slots of positions [start, stop)."""
        table, size = self.tables[sequence], self.block_size
        return [table[i // size] * size + i % size for i in range(start, stop)]

    def blocks(self, sequence: int, stop: int) -> list[int]:
        """Return the blocks of positions [0, stop)."""
        return self.tables[sequence][: -(-stop // self.block_size)]

    def build_inputs(self, chunks: Sequence[tuple[int, int]], decodes: Sequence[int]) -> AttentionInputs:
        """Return the inputs of a step: (sequence, tokens) for each chunk, and the sequences that decode one token."""
        positions: list[int] = []
        slots: list[int] = []
        spans, start = [], 0
        for sequence, count in [*chunks, *((sequence, 1) for sequence in decodes)]:
            first = self.computed[sequence]
            positions += range(first, first + count)
            slots += self.slots(sequence, first, first + count)
        for sequence, count in chunks:
            stop = self.computed[sequence] + count
            spans.append(ChunkSpan(start, count, stop, torch.tensor(self.blocks(sequence, stop))))
            start += count
        lengths = [self.computed[sequence] + 1 for sequence in decodes]
        tables = [self.blocks(sequence, length) for sequence, length in zip(decodes, lengths)]
        width = max(map(len, tables), default=0)
        decoded = list(zip(decodes, lengths))
        repeats = not chunks and decoded == [(sequence, length + 1) for sequence, length in self._decoded]
        self._decoded = decoded
        return AttentionInputs(
            block_size=self.block_size,
            positions=torch.tensor(positions),
            max_length=max(positions) + 1,
            write_blocks=torch.tensor(slots) // self.block_size,
            write_places=torch.tensor(slots) % self.block_size,
            chunks=tuple(spans),
            decode_start=start,
            decode_blocks=torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int64),
            decode_lengths=torch.tensor(lengths, dtype=torch.int64),
            repeats_decodes=repeats,
        )


def run_step(
    model: LlamaModel,
    pages: PagedSequences,
    cache: Sequence[KvLayer],
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
