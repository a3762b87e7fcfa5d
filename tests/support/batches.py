"""A plain-Python batch that makes random valid steps and says what each must do: the reference for the workers' batch state."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from zspmd.transport.batch import BatchStep, SlotAdd, decode_batch_step, encode_batch_step


@dataclass
class PlainSequence:
    tokens: list[int]
    num_prompt: int
    num_computed: int
    blocks: list[int]
    add: SlotAdd


class PlainBatch:
    """Plays the driver: joins, leaves, chunks and decodes at random, with blocks from a free list.

    Attributes:
        sequences: by slot.
        rows: (slot, start, tokens) of the latest step, chunks first; ``num_chunks`` of them are chunks.
    """

    def __init__(self, seed: int, *, max_num_seqs: int = 6, max_model_len: int = 40, block_size: int = 4, vocab_size: int = 50) -> None:
        self.random = random.Random(seed)
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.block_size, self.vocab_size = block_size, vocab_size
        self.num_blocks = 1 + max_num_seqs * -(-max_model_len // block_size)
        self.free = self.random.sample(range(1, self.num_blocks), self.num_blocks - 1)
        self.sequences: dict[int, PlainSequence] = {}
        self.rows: list[tuple[int, int, int]] = []
        self.num_chunks = 0
        self._decode_slots: list[int] | None = None

    def next_step(self) -> BatchStep:
        """Return a step as a rank receives it, and take it into account."""
        deletes = [slot for slot in sorted(self.sequences) if self._leaves(slot)]
        for slot in deletes:
            self.free += self.sequences.pop(slot).blocks
        adds = [self._join(slot) for slot in range(self.max_num_seqs) if slot not in self.sequences and self.random.random() < 0.3]
        chunks, decodes = self._choose_rows()
        blocks = [(slot, block) for slot, count in [*chunks, *((slot, 1) for slot in decodes)] for block in self._grow(slot, count)]
        self.random.shuffle(blocks)
        for slot, block in blocks:
            self.sequences[slot].blocks.append(block)
        self.rows = [(slot, self.sequences[slot].num_computed, count) for slot, count in [*chunks, *((slot, 1) for slot in decodes)]]
        self.num_chunks = len(chunks)
        is_same = decodes == self._decode_slots
        self._decode_slots = decodes
        step = BatchStep(
            deletes=deletes,
            adds=adds,
            block_slots=np.array([slot for slot, _ in blocks], np.uint16),
            block_ids=np.array([block for _, block in blocks], np.uint32),
            chunk_slots=np.array([slot for slot, _ in chunks], np.uint16),
            chunk_tokens=np.array([count for _, count in chunks], np.uint32),
            decode_slots=None if is_same else np.array(decodes, np.uint16),
        )
        return decode_batch_step(encode_batch_step(step))

    def sampled_slots(self) -> list[int]:
        """Return the slots whose rows reach the end of their known tokens."""
        return [slot for slot, start, count in self.rows if start + count == len(self.sequences[slot].tokens)]

    def finish_step(self, sampled: dict[int, int]) -> None:
        """Mark the rows computed and append the sampled tokens."""
        for slot, start, count in self.rows:
            self.sequences[slot].num_computed = start + count
        for slot, token in sampled.items():
            self.sequences[slot].tokens.append(token)

    def _leaves(self, slot: int) -> bool:
        return len(self.sequences[slot].tokens) > self.max_model_len or self.random.random() < 0.03

    def _join(self, slot: int) -> SlotAdd:
        count = self.random.randint(1, self.max_model_len // 2)
        num_computed = self.random.choice([0, self.random.randrange(count)])
        tokens = [self.random.randrange(self.vocab_size) for _ in range(count)]
        blocks = [self.free.pop() for _ in range(-(-num_computed // self.block_size))]
        add = SlotAdd(
            slot=slot,
            tokens=np.array(tokens, np.int32),
            num_prompt=self.random.randint(1, count),
            num_computed=num_computed,
            blocks=np.array(blocks, np.uint32),
            seed=self.random.randrange(1 << 63),
            temperature=self.random.random(),
            top_k=self.random.randrange(9),
            logprobs=self.random.choice([-1, 3]),
            end_token_ids=np.array([7], np.int32),
        )
        self.sequences[slot] = PlainSequence(tokens, add.num_prompt, num_computed, [], add)
        self.sequences[slot].blocks += blocks
        return add

    def _choose_rows(self) -> tuple[list[tuple[int, int]], list[int]]:
        chunks: list[tuple[int, int]] = []
        decodes: list[int] = []
        decode_chance = self.random.choice([0.0, 0.97, 1.0])
        for slot, sequence in self.sequences.items():
            left = len(sequence.tokens) - sequence.num_computed
            if left == 1 and self.random.random() < decode_chance:
                decodes.append(slot)
            elif left > 1 and self.random.random() < 0.8:
                chunks.append((slot, self.random.randint(1, left)))
        return chunks, decodes

    def _grow(self, slot: int, count: int) -> list[int]:
        sequence = self.sequences[slot]
        wanted = -(-(sequence.num_computed + count) // self.block_size)
        return [self.free.pop() for _ in range(wanted - len(sequence.blocks))]
