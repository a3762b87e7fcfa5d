"""A step in the making, the step that comes of it, and what it brings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ...transport.batch import SAME_BATCHES, BatchStep, SlotAdd, U8Array
from .request import I32Array, Sequence


@dataclass(eq=False, slots=True)
class ScheduledStep:
    """A step to publish, and what the scheduler must remember of it until its tokens are back.

    Attributes:
        batch: for the ranks.
        sampled: the sequence of each row that is sampled, in row order: chunks, then decodes.
        unsampled: sequences of which the step computes a part of the prompt.
        num_tokens: tokens that the step computes, at most where it holds drafts.
        num_decodes: how many of ``sampled`` are decodes.
        replica: whose ranks compute it.
        published_at: by the monotonic clock, in seconds.
    """

    batch: BatchStep
    sampled: tuple[Sequence, ...]
    unsampled: tuple[Sequence, ...]
    num_tokens: int
    num_decodes: int
    replica: int = 0
    published_at: float = 0.0

    def most_tokens(self, place: int) -> int:
        """Return how many tokens ``sampled[place]`` can gain."""
        return 1 if place < len(self.sampled) - self.num_decodes else 1 + self.batch.max_drafts


class Update(NamedTuple):
    """What a step brought to one sequence; ``finish_reason`` is None while it goes on."""

    sequence: Sequence
    token_ids: list[int]
    finish_reason: str | None


@dataclass(slots=True)
class StepPlan:
    """Rows and deltas of one step, collected in the order of the batch; ``budget`` is how many tokens it can still take.

    ``max_drafts`` is how many drafts each decode may hold.
    """

    budget: int
    replica: int = 0
    max_drafts: int = 0
    adds: list[SlotAdd] = field(default_factory=list)
    block_slots: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)
    chunk_samples: list[Sequence] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)

    def append_block(self, slot: int, block: int) -> None:
        self.block_slots.append(slot)
        self.block_ids.append(block)

    def build(self, deletes: list[int], decode_slots: list[int] | None, *, has_tokens: bool = False) -> ScheduledStep:
        """Return the step; ``decode_slots`` None stands for those of the step before. ``has_tokens``: ranks are told the newest tokens."""
        if decode_slots is None and not (self.chunks or self.adds or self.block_slots or deletes):
            num_tokens = len(self.decodes) * (1 + self.max_drafts)
            return ScheduledStep(SAME_BATCHES[self.max_drafts], tuple(self.decodes), (), num_tokens, len(self.decodes), self.replica)
        tokens, counts = _untold(self.decodes) if has_tokens else (None, None)
        batch = BatchStep(
            deletes=tuple(deletes),
            adds=tuple(self.adds),
            block_slots=np.array(self.block_slots, np.uint16),
            block_ids=np.array(self.block_ids, np.uint32),
            chunk_slots=np.array([sequence.slot for sequence, _ in self.chunks], np.uint16),
            chunk_tokens=np.array([count for _, count in self.chunks], np.uint32),
            decode_slots=None if decode_slots is None else np.array(decode_slots, np.uint16),
            decode_tokens=tokens,
            decode_counts=counts,
            max_drafts=self.max_drafts,
        )
        num_tokens = len(self.decodes) * (1 + self.max_drafts) + sum(count for _, count in self.chunks)
        unsampled = tuple(sequence for sequence, _ in self.chunks if sequence not in self.chunk_samples)
        return ScheduledStep(batch, (*self.chunk_samples, *self.decodes), unsampled, num_tokens, len(self.decodes), self.replica)


def _untold(decodes: list[Sequence]) -> tuple[I32Array, U8Array | None]:
    """Return the tokens that ranks do not know yet, one sequence after another, and how many each has; None where each has one."""
    counts = []
    tokens: list[int] = []
    for sequence in decodes:
        untold = sequence.output_token_ids[sequence.num_told - sequence.num_prompt :]
        tokens += untold
        counts.append(len(untold))
        sequence.num_told += len(untold)
    has_one_each = len(tokens) == len(decodes)
    return np.array(tokens, np.int32), None if has_one_each else np.array(counts, np.uint8)


def build_slot_add(sequence: Sequence, *, tells_ends: bool) -> SlotAdd:
    """Return what a rank must know of a sequence that joins the batch: every token known so far, its blocks, its parameters.

    Without ``tells_ends`` the tokens that end it travel only where ``min_tokens`` forbids them.
    """
    params = sequence.params
    end_token_ids = sorted(sequence.end_token_ids) if params.min_tokens or tells_ends else []
    return SlotAdd(
        slot=sequence.slot,
        tokens=sequence.token_ids(),
        num_prompt=sequence.num_prompt,
        num_computed=sequence.num_computed,
        blocks=np.array(sequence.blocks, np.uint32),
        seed=sequence.seed,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logprobs=-1 if params.logprobs is None else params.logprobs,
        min_tokens=params.min_tokens,
        end_token_ids=np.array(end_token_ids, np.int32),
        max_num_tokens=sequence.max_num_tokens,
    )
