"""Speculation on one rank: how many tokens are proposed in a step, by whom, and what is learnt of what became of them.

    step message ---> policy: K ---> proposers: drafts ---> the target computes rows with drafts ---> verification
                        ^_______________________ what was accepted __________________________________________|

All of it is a function of the step messages, so that every rank does the same and nobody tells anybody.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...transport.batch import BatchStep
from ..batch_inputs import StepInputs
from ..batch_state import BatchState, I64Array, StepRows
from ..sampler import SampledTokens, Sampler
from .depth import DepthPolicy
from .proposer import Proposer
from .rejecting import reject_drafts
from .verification import Verdict, verify_by_match

_MAX_ROOM = 1 << 32  # where nothing decodes


class Speculator:
    """Adds drafts to the decode rows of a step.

    Args:
        proposer: of the drafts.
        policy: says how many.
        max_num_seqs: slots.
        rejects: whether drafts of sequences with a temperature are judged by rejection sampling.

    Attributes:
        depth: drafts that were asked for in the latest step, for each decode row.
    """

    def __init__(self, proposer: Proposer, policy: DepthPolicy, max_num_seqs: int, *, rejects: bool) -> None:
        self.depth = 0
        self.proposer = proposer
        self._rejects = rejects
        self._policy = policy
        self._depths = np.zeros(max_num_seqs, np.int64)  # of each slot's latest row, until it is known what became of its drafts
        self._end_token_ids: list[frozenset[int]] = [frozenset()] * max_num_seqs
        self._last_slots = np.empty(0, np.int64)  # decode rows of the latest step
        self._room = 0  # steps for which all of these still have room if each step goes on with them and has no drafts

    def extend(self, step: BatchStep, state: BatchState, rows: StepRows) -> StepRows:
        """Return the rows with their drafts, which are in ``state.tokens``; ``rows`` is what ``state`` made of ``step``.

        A sequence that has all its tokens, or whose end was verified, is left out: the driver may not know yet. With no drafts to ask for
        and none to leave out it returns ``rows`` itself: a step as without speculation.
        """
        self._follow(step, state)
        decodes = rows.slots[rows.num_chunks :] if rows.num_chunks else rows.slots
        goes_on = rows.repeats_decodes and decodes is self._last_slots and self._room > 0
        if not goes_on:
            room = state.max_num_tokens[decodes] - state.num_tokens[decodes]
            if not room.all():
                decodes, room = decodes[room > 0], room[room > 0]
            self._room = int(room.min(initial=_MAX_ROOM))
        self.depth = min(self._policy.choose(len(decodes)), step.max_drafts) if len(decodes) else 0
        self._room = 0 if self.depth else self._room - 1
        if goes_on and not self.depth:
            return rows
        num_drafts = self._propose(state, decodes)
        repeats = rows.repeats_decodes and np.array_equal(decodes, self._last_slots)
        self._last_slots = decodes
        if num_drafts is None and len(decodes) == len(rows.slots) - rows.num_chunks and repeats == rows.repeats_decodes:
            return rows
        chunks = slice(rows.num_chunks)
        starts = np.concatenate((rows.starts[chunks], state.num_computed[decodes]))
        num_decoded = np.ones(len(decodes), np.int64) if num_drafts is None else num_drafts + 1
        num_tokens = np.concatenate((rows.num_tokens[chunks], num_decoded))
        return StepRows(np.concatenate((rows.slots[chunks], decodes)), starts, num_tokens, starts + num_tokens, rows.num_chunks, repeats)

    def verify(
        self, state: BatchState, rows: StepRows, inputs: StepInputs, logits: Tensor, sampler: Sampler, *, is_told: bool
    ) -> tuple[SampledTokens, Verdict]:
        """Sample behind each sequence's newest token and behind its drafts, and keep what agrees.

        Args:
            rows: that were computed, with ``inputs``; at least one of them samples.
            logits: float32 [R, W] of the sampled rows.
            sampler: all ranks that share its vocabulary must call this.
            is_told: whether the driver will tell what was kept, so that ``state`` is left as it is.

        Returns:
            The tokens that were kept, one sequence after another, and what became of the drafts.
        """
        slots, places = inputs.sampled_slots, inputs.sampled_places
        draw = sampler.draw(logits, state, slots, places)
        token_ids, is_sampled = draw.token_ids, rows.ends >= state.num_tokens[rows.slots]
        verdict = verify_by_match(state, slots, places, token_ids, rows.num_drafts[is_sampled])
        if self._rejects:
            verdict, token_ids = reject_drafts(verdict, sampler, logits, state, places, token_ids, self.proposer)
        logprobs = sampler.describe(draw, state, slots, token_ids)
        kept = verdict.kept_rows()
        if not is_told:
            state.accept(verdict.slots, verdict.num_accepted, verdict.next_tokens)
            self._settle(state, verdict.slots, verdict.num_accepted)
            self._end(state, verdict)
        return SampledTokens(token_ids[kept], None if logprobs is None else [logprobs[row] for row in kept.tolist()]), verdict

    def report(self, scheduled: StepRows, verdict: Verdict | None) -> list[npt.NDArray[np.uint8]]:
        """Return the tokens that each sequence has gained and the drafts that it had, each uint8 [sequences].

        The sequences are those that the driver takes to sample: chunks that end a prompt, then all that decode. One that had all its
        tokens has 0 of both.
        """
        counts, drafts = np.zeros(len(self._depths), np.uint8), np.zeros(len(self._depths), np.uint8)
        if verdict is not None:
            counts[verdict.slots], drafts[verdict.slots] = verdict.num_accepted + 1, verdict.num_drafts
        is_expected = np.arange(len(scheduled.slots)) >= scheduled.num_chunks
        slots = scheduled.slots[is_expected | (counts[scheduled.slots] > 0)]
        return [counts[slots], drafts[slots]]

    def _follow(self, step: BatchStep, state: BatchState) -> None:
        """Take note of what a step says beside its rows."""
        if step.costs:
            self._policy.take_costs(step.costs)
        for add in step.adds:
            self._depths[add.slot] = 0
            self._end_token_ids[add.slot] = frozenset(add.end_token_ids.tolist())
        self.proposer.follow(step, state)
        if step.decode_slots is not None and step.decode_tokens is not None:  # another stage has verified
            slots = step.decode_slots.astype(np.int64)
            counts = np.ones(len(slots), np.int64) if step.decode_counts is None else step.decode_counts.astype(np.int64)
            self._settle(state, slots, counts - 1)

    def _propose(self, state: BatchState, decodes: I64Array) -> I64Array | None:
        """Have drafts proposed and return how many each of ``decodes`` got; None where none are asked for."""
        self._depths[decodes] = self.depth
        if not self.depth:
            return None
        lengths, capacity = state.num_tokens[decodes], state.block_counts[decodes] * state.block_size
        most = np.minimum(state.max_num_tokens[decodes] - 1, capacity) - lengths
        return self.proposer.propose(state, decodes, lengths, most.clip(0, self.depth))

    def _end(self, state: BatchState, verdict: Verdict) -> None:
        """Take sequences for full that have sampled a token that ends them: the driver publishes steps with them until it knows."""
        for slot, num_accepted in zip(verdict.slots.tolist(), verdict.num_accepted.tolist()):
            num_tokens = int(state.num_tokens[slot])
            first = max(num_tokens - num_accepted - 1, int(state.num_prompt[slot] + state.sampling["min_tokens"][slot]))
            if not self._end_token_ids[slot].isdisjoint(state.tokens[slot, first:num_tokens].tolist()):
                state.max_num_tokens[slot] = num_tokens
                self._room = 0

    def _settle(self, state: BatchState, slots: I64Array, num_accepted: I64Array) -> None:
        """Learn how many drafts of each of ``slots`` were kept; ``state`` has them and the tokens behind them."""
        depths = self._depths[slots]
        was_asked = depths > 0
        if was_asked.any():
            self._policy.observe(num_accepted[was_asked], depths=depths[was_asked])
            self.proposer.settle(slots, state.num_tokens[slots])
        self._depths[slots] = 0
