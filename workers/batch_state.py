"""What every rank knows of the running batch: slots with their tokens, block tables and sampling parameters.

A ``BatchStep`` names only what changed; applying the same steps in the same order gives the same state on every rank. Everything is a
NumPy array indexed by slot, so that a step costs the same few array operations whatever the batch.

    tokens      | prompt ............ | generated ..... | drafts       one row a slot
                ^0        ^num_computed                 ^num_tokens (known)

Drafts of speculation stand behind the known tokens until it is decided which of them are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BadFrameError, InternalError
from ..transport.batch import BatchStep, SlotAdd, U8Array

I64Array = npt.NDArray[np.int64]
I32Array = npt.NDArray[np.int32]

GREEDY_BELOW = 1e-5  # Gumbel noise spans 26, so that below this temperature it decides only between logits closer than 2.6e-4

# The fields of SlotAdd that steer sampling, one record a slot, and what follows from them, so that no step works it out again.
SAMPLING_DTYPE = np.dtype(
    [
        ("seed", np.uint64),
        ("temperature", np.float64),
        ("top_k", np.int64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition_penalty", np.float64),
        ("presence_penalty", np.float64),
        ("frequency_penalty", np.float64),
        ("logprobs", np.int64),
        ("min_tokens", np.int64),
        ("is_random", np.bool_),  # Gumbel noise is added
        ("is_whole", np.bool_),  # needs the logits of the whole vocabulary
        ("is_changed", np.bool_),  # logits depend on the history
    ],
    align=True,
)
_NUM_DERIVED = 3
_SAMPLING_FIELDS = (SAMPLING_DTYPE.names or ())[:-_NUM_DERIVED]


@dataclass(frozen=True)
class StepRows:
    """The sequences that one step computes: its chunks in order, then its decode slots in order, each with its newest token and drafts.

    Args:
        slots: int64 [N].
        starts: int64 [N], the first position that each computes.
        num_tokens: int64 [N], how many positions it computes.
        ends: int64 [N], the position after each one's last.
        num_chunks: how many of the N are chunks.
        repeats_decodes: there are no chunks, and the decode slots are those of the step before, which all go on where they were.
    """

    slots: I64Array
    starts: I64Array
    num_tokens: I64Array
    ends: I64Array
    num_chunks: int
    repeats_decodes: bool = False

    @property
    def num_drafts(self) -> I64Array:
        """int64 [N], the tokens behind each one's newest; 0 for chunks."""
        counts = self.num_tokens - 1
        counts[: self.num_chunks] = 0
        return counts


class BatchState:
    """The batch on one rank.

    Args:
        max_num_seqs: slots.
        max_model_len: tokens that a sequence may compute; one more may be known, the last one sampled.
        block_size: KV positions in a block.
        num_blocks: blocks of the KV pool, the reserved block 0 included.
        may_be_full: whether a step may name a decode slot whose sequence has all its tokens, since the driver did not know that yet. Its
            row is for the caller to leave out.

    Attributes:
        is_live: bool [S], whether a sequence holds the slot; the other arrays mean nothing where it is False.
        tokens: int32 [S, max_model_len + 1]. num_tokens, num_prompt, num_computed, max_num_tokens: int64 [S].
        block_table: int64 [S, B], 0 after a slot's last block. block_counts: int64 [S].
        sampling: records of ``SAMPLING_DTYPE`` [S]. end_token_ids: int32 [e] for each slot.
        is_greedy: bool [S], where nothing but the largest logit is asked for.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, num_blocks: int, *, may_be_full: bool = False) -> None:
        self._may_be_full = may_be_full
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.is_live = np.zeros(max_num_seqs, np.bool_)
        self.tokens = np.zeros((max_num_seqs, max_model_len + 1), np.int32)
        self.num_tokens = np.zeros(max_num_seqs, np.int64)
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        self.max_num_tokens = np.zeros(max_num_seqs, np.int64)
        self.block_table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int64)
        self.block_counts = np.zeros(max_num_seqs, np.int64)
        self.sampling = np.zeros(max_num_seqs, SAMPLING_DTYPE)
        self.is_greedy = np.zeros(max_num_seqs, np.bool_)
        self.end_token_ids: list[I32Array] = [np.empty(0, np.int32)] * max_num_seqs
        self._decode_slots: I64Array = np.empty(0, np.int64)
        self._one_each: I64Array = np.empty(0, np.int64)  # tokens of the decode slots

    def apply(self, step: BatchStep) -> StepRows:
        """Apply a step's deltas (deletes, adds, blocks) and return the rows that it computes.

        The state is of no more use after an error: the deltas before it were applied.

        Raises:
            BadFrameError: a slot or block outside its range, or a chunk of no tokens.
            InternalError: the step contradicts what earlier steps built; the message names the slot and the numbers.
        """
        self._delete(step.deletes)
        for add in step.adds:
            self._add(add)
        if len(step.block_slots):
            self._append_blocks(step.block_slots.astype(np.int64), step.block_ids.astype(np.int64))
        if step.decode_slots is not None:
            self._decode_slots = step.decode_slots.astype(np.int64)
            self._one_each = np.ones(len(self._decode_slots), np.int64)
            if step.decode_tokens is not None:
                self._take_tokens(self._decode_slots, step.decode_tokens, step.decode_counts)
        elif not (step.deletes or step.adds or len(step.chunk_slots)):
            return self._repeat_decodes()
        return self._select_rows(step.chunk_slots.astype(np.int64), step.chunk_tokens.astype(np.int64), self._decode_slots)

    def mark_computed(self, rows: StepRows) -> None:
        """Record that the KV of these rows is in the cache now; that of drafts counts once they are accepted."""
        self.num_computed[rows.slots] = np.minimum(rows.ends, self.num_tokens[rows.slots])

    def append_sampled(self, slots: I64Array, tokens: I32Array) -> None:
        """Append one sampled token, or what stands for it, to each of ``slots`` (int64 [R], no slot twice); ``tokens`` int32 [R].

        Raises:
            InternalError: a slot is full.
        """
        places = self.num_tokens[slots]
        if (places >= self.tokens.shape[1]).any():
            slot = slots[places.argmax()]
            raise InternalError(f"slot {slot} holds {places.max()} tokens; there is no room for the one that it sampled")
        self.tokens[slots, places] = tokens
        self.num_tokens[slots] = places + 1

    def accept(self, slots: I64Array, num_accepted: I64Array, next_tokens: I32Array) -> None:
        """Keep the first drafts of each of ``slots``, whose KV is in the cache, and append the token that was sampled behind them.

        Args:
            slots: int64 [R], no slot twice.
            num_accepted: int64 [R].
            next_tokens: int32 [R].

        Raises:
            InternalError: a slot is full.
        """
        self.num_tokens[slots] += num_accepted
        self.num_computed[slots] = self.num_tokens[slots]
        self.append_sampled(slots, next_tokens)

    def _take_tokens(self, slots: I64Array, tokens: I32Array, counts: U8Array | None) -> None:
        """Append what another stage has sampled for each decode slot: the newest token, and before it the drafts that were accepted."""
        self._check_slots("token for", slots)
        if len(np.unique(slots)) < len(slots) or not self.is_live[slots].all():
            raise InternalError(f"tokens for the slots {slots.tolist()}, of which one is named twice or held by no sequence")
        is_behind = self.num_computed[slots] < self.num_tokens[slots]
        if is_behind.any():
            slot = slots[is_behind.argmax()]
            raise InternalError(
                f"a token for slot {slot}, of which {self.num_computed[slot]} of {self.num_tokens[slot]} known tokens are computed"
            )
        if counts is None:
            self.append_sampled(slots, tokens)
            return
        if not counts.all():
            raise BadFrameError(f"no token for slot {slots[counts.argmin()]}; a decode slot comes with one at least")
        lasts = np.cumsum(counts, dtype=np.int64) - 1
        num_accepted = counts.astype(np.int64) - 1
        if (self.num_tokens[slots] + num_accepted >= self.tokens.shape[1]).any():
            raise InternalError(f"{counts.max()} tokens for a slot that has no room for them")
        drafted = np.delete(tokens, lasts)
        places = np.arange(len(drafted)) + np.repeat(self.num_tokens[slots] - np.cumsum(num_accepted) + num_accepted, num_accepted)
        self.tokens[np.repeat(slots, num_accepted), places] = drafted
        self.accept(slots, num_accepted, tokens[lasts])

    def _delete(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._check_slots("delete", slot)
            if not self.is_live[slot]:
                raise InternalError(f"delete of slot {slot}, which no sequence holds")
            self.is_live[slot] = False

    def _add(self, add: SlotAdd) -> None:
        slot, count, num_blocks = add.slot, len(add.tokens), len(add.blocks)
        self._check_slots("add", slot)
        if self.is_live[slot]:
            raise InternalError(f"add to slot {slot}, which a sequence of {self.num_tokens[slot]} tokens still holds")
        room = self.tokens.shape[1] - 1
        if not 1 <= add.num_prompt <= count <= room:
            raise InternalError(f"add to slot {slot}: {add.num_prompt} prompt tokens of {count}, where a slot has room for {room}")
        if not 0 <= add.num_computed < count or add.num_computed > num_blocks * self.block_size:
            raise InternalError(
                f"add to slot {slot}: {add.num_computed} of {count} tokens computed, in {num_blocks} blocks of {self.block_size}"
            )
        self.is_live[slot] = True
        self.tokens[slot, :count] = add.tokens
        self.num_tokens[slot], self.num_prompt[slot], self.num_computed[slot] = count, add.num_prompt, add.num_computed
        self.max_num_tokens[slot] = min(add.max_num_tokens, self.tokens.shape[1])
        self.block_table[slot] = 0
        self.block_counts[slot] = 0
        self._append_blocks(np.full(num_blocks, slot, np.int64), add.blocks.astype(np.int64))
        derived = _derive_sampling(add)
        self.sampling[slot] = (*(getattr(add, name) for name in _SAMPLING_FIELDS), *derived)
        self.is_greedy[slot] = not any(derived)
        self.end_token_ids[slot] = add.end_token_ids

    def _append_blocks(self, slots: I64Array, blocks: I64Array) -> None:
        self._check_slots("block for", slots)
        if not self.is_live[slots].all():
            raise InternalError(f"block for slot {slots[~self.is_live[slots]][0]}, which no sequence holds")
        if ((blocks < 1) | (blocks >= self.num_blocks)).any():
            block = blocks[(blocks < 1) | (blocks >= self.num_blocks)][0]
            raise BadFrameError(f"block {block} is outside the pool; blocks 1 to {self.num_blocks - 1} may be used")
        places = self.block_counts[slots]
        if not (slots[1:] > slots[:-1]).all():  # else one block a slot, as in most steps that have any
            order = np.argsort(slots, kind="stable")
            slots, blocks = slots[order], blocks[order]
            places = self.block_counts[slots] + np.arange(len(slots)) - np.searchsorted(slots, slots)
        limit = self.block_table.shape[1]
        if (places >= limit).any():
            raise InternalError(f"slot {slots[places.argmax()]} gets more than the {limit} blocks that its longest sequence needs")
        self.block_table[slots, places] = blocks
        self.block_counts[slots] = places + 1  # of a slot's several, the last one stays

    def _repeat_decodes(self) -> StepRows:
        """Return a token each of the slots that decoded in the step before: known to be live and different, since none has left."""
        slots = self._decode_slots
        starts = self.num_computed[slots]
        rows = StepRows(slots, starts, self._one_each, starts + 1, 0, repeats_decodes=True)
        if (rows.ends > np.minimum(self.num_tokens[slots], self.block_counts[slots] * self.block_size)).any():
            self._check_rows(rows)
        return rows

    def _select_rows(self, chunk_slots: I64Array, chunk_tokens: I64Array, decode_slots: I64Array) -> StepRows:
        slots = np.concatenate((chunk_slots, decode_slots))
        num_tokens = np.ones(len(slots), np.int64)
        num_tokens[: len(chunk_slots)] = chunk_tokens
        self._check_slots("row for", slots)
        starts = self.num_computed[slots]
        rows = StepRows(slots, starts, num_tokens, starts + num_tokens, len(chunk_slots))
        self._check_rows(rows)
        return rows

    def _check_slots(self, what: str, slots: Any) -> None:
        worst = int(np.max(slots, initial=0))
        if worst >= len(self.is_live):
            raise BadFrameError(f"{what} slot {worst}; this batch has slots 0 to {len(self.is_live) - 1}")

    def _check_rows(self, rows: StepRows) -> None:
        slots, ends = rows.slots, rows.ends
        uses = np.bincount(slots, minlength=1)
        if uses.max() > 1:
            raise InternalError(f"slot {uses.argmax()} has {uses.max()} rows in one step; a sequence may have one")
        capacity = self.block_counts[slots] * self.block_size
        lacks_blocks = ends > capacity
        if self._may_be_full:  # a full sequence has no block for its last token, which nobody computes
            lacks_blocks &= self.num_tokens[slots] < self.max_num_tokens[slots]
        is_bad = ~self.is_live[slots] | (rows.num_tokens < 1) | (ends > self.num_tokens[slots]) | lacks_blocks
        if is_bad.any():
            self._raise_bad_row(rows, int(is_bad.argmax()))

    def _raise_bad_row(self, rows: StepRows, row: int) -> None:
        slot, start, count = (int(values[row]) for values in (rows.slots, rows.starts, rows.num_tokens))
        kind = "chunk" if row < rows.num_chunks else "decode"
        if not self.is_live[slot]:
            raise InternalError(f"{kind} of slot {slot}, which no sequence holds")
        if count < 1:
            raise BadFrameError(f"chunk of slot {slot} has {count} tokens; it must have at least 1")
        what = f"{kind} of slot {slot} computes positions {start} to {start + count - 1}"
        if start + count > self.num_tokens[slot]:
            raise InternalError(f"{what}, but only {self.num_tokens[slot]} tokens are known")
        room = self.block_counts[slot] * self.block_size
        raise InternalError(f"{what}, but its {self.block_counts[slot]} blocks of {self.block_size} hold {room}")


def _derive_sampling(add: SlotAdd) -> tuple[bool, bool, bool]:
    """Return is_random, is_whole and is_changed of ``SAMPLING_DTYPE``."""
    is_random = add.temperature >= GREEDY_BELOW
    is_filtered = add.top_k > 0 or add.top_p < 1 or add.min_p > 0
    is_penalised = add.repetition_penalty != 1 or add.presence_penalty != 0 or add.frequency_penalty != 0
    return is_random, add.logprobs >= 0 or (is_filtered and is_random), is_penalised or add.min_tokens > 0
