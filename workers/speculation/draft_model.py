"""Drafts from a smaller model with the target's vocabulary, and a KV cache of its own under the target's block tables.

The draft's cache has the target's blocks: the same ids, as many positions each. So a sequence's blocks, those that it shares with others
included, are the draft's as well, and what must be known beside them is how far the draft has computed:

    tokens            | known ............................ | drafts ...
    num_computed      ^ of the slot: up to here the draft's cache holds what the tokens say
    is_whole          of a block: the draft has computed all of it, so that a sequence that comes to share it need not

The draft runs only when it is asked, and first catches up with what was generated, accepted or refused since.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ...models.attention import KvLayer
from ...models.llama import LlamaModel
from ...transport.batch import BatchStep
from ..batch_inputs import StepInputs, build_inputs
from ..batch_state import BatchState, I64Array, StepRows
from ..gumbel import Stream
from ..sampler import Sampler
from .proposer import Proposer
from .rejection import probabilities
from .verification import verify_by_match, without_drafts

_CHUNK_TOKENS = 2048  # computed at once where the draft is behind
_WIDE_ROW = 8  # tokens: a sequence that is further behind is caught up with in a chunk


class DraftProposer:
    """Proposes what a draft model would say.

    Args:
        model: the draft, its weights loaded.
        sampler: of its logits, over the ranks that share it.
        k: most tokens proposed at once.
        vocab_size: the target's; no draft is at or above it.
        max_num_seqs: slots.
        inner: proposes to the draft in turn; None leaves it alone.
        keeps_probabilities: drafts are drawn with noise of their own, and what from is kept, as rejection sampling asks; otherwise
            they are drawn with the noise that the target will use.
    """

    def __init__(
        self,
        model: LlamaModel,
        sampler: Sampler,
        *,
        k: int,
        vocab_size: int,
        max_num_seqs: int,
        inner: Proposer | None,
        keeps_probabilities: bool,
    ) -> None:
        self._model = model
        self._sampler = sampler
        self._k = k
        self._limit = min(vocab_size, model.config.vocab_size)
        self._num_foreign = vocab_size - self._limit  # the target's padding, which no checkpoint uses
        self._inner = inner
        self._keeps_probabilities = keeps_probabilities
        self._stream = Stream.DRAFT if keeps_probabilities else Stream.SAMPLE
        self._drawn_from: dict[int, list[Tensor]] = {}
        self._num_computed = np.zeros(max_num_seqs, np.int64)
        self._num_whole = np.zeros(max_num_seqs, np.int64)  # blocks of the slot known as whole
        self._is_whole = np.zeros(0, np.bool_)
        self._kv_cache: list[KvLayer] = []
        self._last_slots: I64Array | None = None  # of the model's last decode rows, while they are what its attention keeps

    def kv_bytes_per_block(self, block_size: int) -> int:
        """Return the bytes that a block takes in the cache of the draft, and of those within it."""
        inner = self._inner.kv_bytes_per_block(block_size) if isinstance(self._inner, DraftProposer) else 0
        return inner + self._model.kv_bytes_per_block(block_size)

    def allocate_kv_cache(self, num_blocks: int, block_size: int) -> None:
        """Make the cache of the draft, and of those within it."""
        self._kv_cache = self._model.allocate_kv_cache(num_blocks, block_size)
        self._is_whole = np.zeros(num_blocks, np.bool_)
        if isinstance(self._inner, DraftProposer):
            self._inner.allocate_kv_cache(num_blocks, block_size)

    def follow(self, step: BatchStep, state: BatchState) -> None:
        """Forget who left, and find what of a newcomer's shared blocks is computed."""
        for add in step.adds:
            num_shared = add.num_computed // state.block_size
            shared = self._is_whole[add.blocks[:num_shared]]
            num_whole = num_shared if shared.all() else int(shared.argmin())
            self._num_whole[add.slot] = num_whole
            self._num_computed[add.slot] = num_whole * state.block_size
            self._is_whole[add.blocks[num_shared:]] = False
        if len(step.block_ids):
            self._is_whole[step.block_ids] = False
        if step.adds or step.deletes:
            self._last_slots = None
        if self._inner is not None:
            self._inner.follow(step, state)

    def propose(self, state: BatchState, slots: I64Array, lengths: I64Array, most: I64Array) -> I64Array:
        """Run the draft until each sequence has its drafts, as ``Proposer`` asks: at most ``k``, none beyond the draft's context."""
        room = np.minimum(self._model.config.max_position_embeddings + 1 - lengths, self._k)
        goals = lengths + np.minimum(most, room).clip(0)
        reached = lengths.copy()
        self._drawn_from = {}
        wanting = np.flatnonzero(goals > reached)
        if len(wanting):
            self._note_whole_blocks(state, slots[wanting])
            self._catch_up(state, slots[wanting], lengths[wanting])
        while len(wanting):
            reached[wanting] += self._advance(state, slots[wanting], reached[wanting], goals[wanting])
            wanting = wanting[goals[wanting] > reached[wanting]]
        num_drafts: I64Array = reached - lengths
        return num_drafts

    def settle(self, slots: I64Array, lengths: I64Array) -> None:
        """Forget what was computed of drafts that were refused."""
        self._num_computed[slots] = np.minimum(self._num_computed[slots], lengths - 1)
        if self._inner is not None:
            self._inner.settle(slots, lengths)

    def draft_probabilities(self, slots: I64Array) -> Tensor | None:
        """Return float64 [N, V], as ``Proposer`` asks; ``slots`` must have a temperature."""
        rows = [row for slot in slots.tolist() for row in self._drawn_from.get(slot, ())]
        return torch.nn.functional.pad(torch.stack(rows), (0, self._num_foreign)) if rows else None

    def _advance(self, state: BatchState, slots: I64Array, lengths: I64Array, goals: I64Array) -> I64Array:
        """Run the draft once, and return how many tokens each sequence has gained: one, and those of the inner proposer that it kept."""
        num_inner = np.zeros(len(slots), np.int64)
        if self._inner is not None:
            num_inner = self._inner.propose(state, slots, lengths, goals - lengths - 1)
        starts, ends = self._num_computed[slots], lengths + num_inner
        repeats = self._last_slots is not None and np.array_equal(slots, self._last_slots)
        num_known = state.num_tokens.copy()
        num_known[slots] = lengths
        inputs = self._build_inputs(state, StepRows(slots, starts, ends - starts, ends, 0, repeats), num_known)
        self._last_slots = slots
        logits = self._compute_logits(inputs)
        drawn = self._sampler.draw(logits, state, inputs.sampled_slots, inputs.sampled_places, stream=self._stream).token_ids
        verdict = without_drafts(slots, drawn)
        if self._inner is not None:
            verdict = verify_by_match(state, inputs.sampled_slots, inputs.sampled_places, drawn, num_inner)
        reached = lengths + verdict.num_accepted
        state.tokens[slots, reached] = verdict.next_tokens
        self._num_computed[slots] = reached
        if self._inner is not None:
            self._inner.settle(slots, reached + 1)
        if self._keeps_probabilities:
            self._keep_probabilities(state, logits, inputs, verdict.kept_rows())
        return verdict.num_accepted + 1

    def _compute_logits(self, inputs: StepInputs) -> Tensor:
        hidden = self._model.forward(inputs.token_ids, inputs.attention, self._kv_cache)
        if len(inputs.sampled_slots) < len(hidden):
            hidden = hidden.index_select(0, inputs.sampled_rows)
        logits = self._model.compute_logits(hidden)
        if self._model.vocab_end > self._limit:
            logits[:, max(0, self._limit - self._model.vocab_start) :] = -torch.inf
        return logits

    def _keep_probabilities(self, state: BatchState, logits: Tensor, inputs: StepInputs, rows: I64Array) -> None:
        """Keep what the drafts in these of the sampled rows were drawn from, where there was chance in it."""
        rows = rows[state.sampling["is_random"][inputs.sampled_slots[rows]]]
        if len(rows):
            slots, kept = inputs.sampled_slots[rows], logits.index_select(0, torch.from_numpy(rows).to(logits.device))
            drawn_from = probabilities(self._sampler.filtered_scores(kept, state, slots, inputs.sampled_places[rows]))
            for slot, row in zip(slots.tolist(), drawn_from):
                self._drawn_from.setdefault(slot, []).append(row)

    def _catch_up(self, state: BatchState, slots: I64Array, lengths: I64Array) -> None:
        """Compute what the draft lacks of sequences that it is far behind, but for their last token."""
        for rows in _cut_chunks(slots, self._num_computed[slots], lengths - 1):
            self._last_slots = None
            inputs = self._build_inputs(state, rows, None)
            self._model.forward(inputs.token_ids, inputs.attention, self._kv_cache)
            self._num_computed[rows.slots] = rows.ends

    def _build_inputs(self, state: BatchState, rows: StepRows, num_known: I64Array | None) -> StepInputs:
        inputs = build_inputs(state, rows, self._model.device, num_known)
        if self._num_foreign:
            inputs.token_ids.clamp_(max=self._limit - 1)
        return inputs

    def _note_whole_blocks(self, state: BatchState, slots: I64Array) -> None:
        """Remember the blocks that are computed to their end, now that the tokens in them stand."""
        num_whole = np.minimum(self._num_computed[slots], state.num_tokens[slots] - 1) // state.block_size
        for place in np.flatnonzero(num_whole > self._num_whole[slots]).tolist():
            slot = slots[place]
            self._is_whole[state.block_table[slot, self._num_whole[slot] : num_whole[place]]] = True
            self._num_whole[slot] = num_whole[place]


def _cut_chunks(slots: I64Array, starts: I64Array, ends: I64Array) -> Iterator[StepRows]:
    """Yield rows of at most ``_CHUNK_TOKENS`` tokens in all, which together take the sequences that are far behind to their ends."""
    cut: list[tuple[int, int, int]] = []
    budget = _CHUNK_TOKENS
    for slot, start, end in zip(slots.tolist(), starts.tolist(), ends.tolist()):
        if end - start < _WIDE_ROW:
            continue
        while start < end:
            stop = min(end, start + budget)
            cut.append((slot, start, stop))
            budget -= stop - start
            start = stop
            if not budget:
                yield _chunk_rows(cut)
                cut, budget = [], _CHUNK_TOKENS
    if cut:
        yield _chunk_rows(cut)


def _chunk_rows(cut: list[tuple[int, int, int]]) -> StepRows:
    slots, starts, ends = np.array(cut, np.int64).T
    return StepRows(slots, starts, ends - starts, ends, len(cut))
