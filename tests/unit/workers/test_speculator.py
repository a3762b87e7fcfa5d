"""How decode rows get their drafts, how many there is room for, who is left out, and what is learnt when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from zspmd.errors import InternalError
from zspmd.transport.batch import BatchStep, SlotAdd
from zspmd.transport.step_cost import StepCost
from zspmd.workers.batch_state import BatchState, I64Array
from zspmd.workers.speculation.speculator import Speculator
from zspmd.workers.speculation.verification import Verdict

BLOCK_SIZE, NUM_SLOTS, LENGTH = 4, 4, 32


class CountingProposer:
    """Proposes 100, 101, ... wherever there is room, and notes what it is told."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []
        self.settled: list[list[list[int]]] = []
        self.num_followed = 0

    def follow(self, step: BatchStep, state: BatchState) -> None:
        self.num_followed += 1

    def propose(self, state: BatchState, slots: I64Array, lengths: I64Array, most: I64Array) -> I64Array:
        self.asked.append([slots.tolist(), lengths.tolist(), most.tolist()])
        for slot, length, count in zip(slots, lengths, most, strict=True):
            state.tokens[slot, length : length + count] = 100 + np.arange(count)
        return most

    def settle(self, slots: I64Array, lengths: I64Array) -> None:
        self.settled.append([slots.tolist(), lengths.tolist()])

    def draft_probabilities(self, slots: I64Array) -> Tensor | None:
        return None


class NotingPolicy:
    """Chooses what it is told to, and notes what it learns."""

    def __init__(self, *depths: int) -> None:
        self.depths = list(depths)
        self.chosen_for: list[int] = []
        self.observed: list[list[Any]] = []
        self.costs: list[StepCost] = []

    def choose(self, num_sequences: int) -> int:
        self.chosen_for.append(num_sequences)
        return self.depths.pop(0)

    def observe(self, num_accepted: I64Array, *, depths: int | I64Array) -> None:
        self.observed.append([num_accepted.tolist(), np.asarray(depths).tolist()])

    def take_costs(self, costs: Iterable[StepCost]) -> None:
        self.costs += costs


def add(slot: int, num_tokens: int, *, most: int = 1 << 31, num_blocks: int = LENGTH // BLOCK_SIZE) -> SlotAdd:
    """Return a sequence of which all but the newest token are computed."""
    blocks = np.arange(1 + slot * 8, 1 + slot * 8 + num_blocks, dtype=np.uint32)
    return SlotAdd(slot, np.arange(num_tokens, dtype=np.int32), 1, num_tokens - 1, blocks, max_num_tokens=most)


def make(*adds: SlotAdd, depths: tuple[int, ...]) -> tuple[Speculator, BatchState, CountingProposer, NotingPolicy]:
    state = BatchState(NUM_SLOTS, LENGTH, BLOCK_SIZE, 1 + NUM_SLOTS * 8, may_be_full=True)
    state.apply(BatchStep(adds=adds))
    proposer, policy = CountingProposer(), NotingPolicy(*depths)
    return Speculator(proposer, policy, NUM_SLOTS, rejects=False), state, proposer, policy


def decode(*slots: int, max_drafts: int = 16, **fields: Any) -> BatchStep:
    return BatchStep(decode_slots=np.array(slots, np.uint16), max_drafts=max_drafts, **fields)


def extend(speculator: Speculator, state: BatchState, step: BatchStep) -> Any:
    return speculator.extend(step, state, state.apply(step))


def test_drafts_stand_behind_the_newest_token() -> None:
    speculator, state, proposer, policy = make(add(0, 5), add(2, 9), depths=(3,))
    rows = extend(speculator, state, decode(2, 0))
    assert (rows.slots.tolist(), rows.starts.tolist(), rows.ends.tolist()) == ([2, 0], [8, 4], [12, 8])
    assert rows.num_drafts.tolist() == [3, 3]
    assert state.tokens[2, 8:12].tolist() == [8, 100, 101, 102]
    assert state.num_tokens[[2, 0]].tolist() == [9, 5], "they are not known yet"
    assert (speculator.depth, policy.chosen_for) == (3, [2])
    assert proposer.asked == [[[2, 0], [9, 5], [3, 3]]]


def test_no_drafts_beyond_what_the_step_the_request_and_the_blocks_allow() -> None:
    adds = (add(0, 5, most=8), add(1, 5, num_blocks=2), add(2, 5), add(3, 5, most=6))
    speculator, state, proposer, _ = make(*adds, depths=(8, 8))
    extend(speculator, state, decode(0, 1, 2, 3, max_drafts=6))
    assert proposer.asked[0][2] == [2, 3, 6, 0], "with the token behind them these are all that each may have"
    assert speculator.depth == 6
    extend(speculator, state, decode(2, max_drafts=0))
    assert speculator.depth == 0
    assert len(proposer.asked) == 1, "nobody is asked for nothing"


def test_depth_0_asks_nobody_and_is_no_observation() -> None:
    speculator, state, proposer, policy = make(add(0, 5), depths=(0,))
    rows = extend(speculator, state, decode(0))
    assert rows.num_tokens.tolist() == [1]
    assert (proposer.asked, proposer.num_followed) == ([], 1)
    speculator._settle(state, np.array([0]), np.array([0]))
    assert (policy.observed, proposer.settled) == ([], [])


@pytest.mark.parametrize(
    ("min_tokens", "is_over"), [pytest.param(7, True, id="from-min-tokens-on"), pytest.param(8, False, id="one-before-min-tokens")]
)
def test_a_sequence_that_has_sampled_its_end_is_left_out(min_tokens: int, is_over: bool) -> None:
    """Its end was the second of three tokens that were kept. The other sequence has the same token, which does not end it."""
    ends = np.array([50, 101], np.int32)
    adds = (replace(add(0, 7), end_token_ids=ends, min_tokens=min_tokens), add(2, 7))
    speculator, state, _, _ = make(depths=(2, 0))
    extend(speculator, state, BatchStep(adds=adds))
    extend(speculator, state, decode(0, 2))
    slots, accepted = np.array([0, 2]), np.array([2, 2])
    verdict = Verdict(slots, np.array([0, 3]), accepted, accepted, np.array([9, 9], np.int32))
    state.accept(slots, accepted, verdict.next_tokens)
    speculator._end(state, verdict)
    assert state.tokens[0, 7:10].tolist() == [100, 101, 9]
    assert extend(speculator, state, BatchStep()).slots.tolist() == ([2] if is_over else [0, 2])


@pytest.mark.parametrize("num_tokens", [8, 9, 10])
def test_a_sequence_with_all_its_tokens_is_left_out(num_tokens: int) -> None:
    """The driver gives it blocks for all but the last of them, and does not know yet that nothing is left to compute."""
    full = add(1, num_tokens, most=num_tokens, num_blocks=-(-(num_tokens - 1) // BLOCK_SIZE))
    speculator, state, _, policy = make(add(0, 5), full, depths=(2,))
    step = decode(1, 0)
    scheduled = state.apply(step)
    rows = speculator.extend(step, state, scheduled)
    assert rows.slots.tolist() == [0]
    assert policy.chosen_for == [1]
    verdict = Verdict(np.array([0]), np.array([0]), np.array([2]), np.array([1]), np.array([7], np.int32))
    assert [part.tolist() for part in speculator.report(scheduled, verdict)] == [[0, 2], [0, 2]]
    step = decode(1)
    scheduled = state.apply(step)
    assert len(speculator.extend(step, state, scheduled).slots) == 0
    assert [part.tolist() for part in speculator.report(scheduled, None)] == [[0], [0]]
    assert policy.chosen_for == [1], "nobody decodes"


def test_a_sequence_that_lacks_a_block_is_an_error() -> None:
    _, state, _, _ = make(add(0, 9, most=12, num_blocks=2), depths=())
    with pytest.raises(InternalError, match="its 2 blocks of 4 hold 8"):
        state.apply(decode(0))


def test_what_another_stage_kept_is_learnt_when_it_is_told() -> None:
    speculator, state, proposer, policy = make(add(0, 5), add(1, 7), depths=(3, 2))
    rows = extend(speculator, state, decode(0, 1, decode_tokens=None))
    state.mark_computed(rows)
    told: dict[str, Any] = {"decode_tokens": np.array([100, 101, 9, 8], np.int32), "decode_counts": np.array([3, 1], np.uint8)}
    extend(speculator, state, decode(0, 1, **told))
    assert policy.observed == [[[2, 0], [3, 3]]]
    assert proposer.settled == [[[0, 1], [8, 8]]]
    assert state.tokens[0, :8].tolist() == [0, 1, 2, 3, 4, 100, 101, 9]
    assert proposer.asked[1] == [[0, 1], [8, 8], [2, 2]]


def test_a_newcomer_in_a_slot_is_not_taken_for_who_left_it() -> None:
    speculator, state, _, policy = make(add(0, 5), depths=(3, 3))
    state.mark_computed(extend(speculator, state, decode(0)))
    step = BatchStep(deletes=[0], adds=[add(0, 6)], decode_slots=np.array([], np.uint16))
    speculator.extend(step, state, state.apply(step))
    state.num_computed[0] = 6
    told: dict[str, Any] = {"decode_tokens": np.array([9], np.int32)}
    extend(speculator, state, decode(0, **told))
    assert policy.observed == []


def test_costs_reach_the_policy() -> None:
    speculator, state, _, policy = make(add(0, 5), depths=(1,))
    extend(speculator, state, decode(0, costs=(StepCost(0, 1, 70),)))
    assert policy.costs == [StepCost(0, 1, 70)]
