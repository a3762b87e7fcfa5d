"""Which drafts are kept, and which rows hold the tokens that are."""

from __future__ import annotations

import random

import numpy as np

from zspmd.workers.batch_state import BatchState
from zspmd.workers.speculation.verification import verify_by_match


def make_state(tokens: list[list[int]]) -> BatchState:
    state = BatchState(len(tokens), 40, 4, 2)
    for slot, row in enumerate(tokens):
        state.tokens[slot, : len(row)] = row
    return state


def test_drafts_are_kept_up_to_the_first_that_differs() -> None:
    state = make_state([[1, 2, 30, 31, 32], [5, 50], [6, 60, 61], [7, 70, 71]])
    slots = np.array([3, 3, 3, 0, 0, 0, 0, 1, 2, 2])
    places = np.array([1, 2, 3, 2, 3, 4, 5, 1, 1, 2])
    sampled = np.array([70, 71, 72, 30, 99, 32, 33, 51, 61, 60], np.int32)
    verdict = verify_by_match(state, slots, places, sampled, np.array([2, 3, 0, 1]))
    assert verdict.slots.tolist() == [3, 0, 1, 2]
    assert verdict.num_accepted.tolist() == [2, 1, 0, 0], "a later draft that agrees again is of no use"
    assert verdict.next_tokens.tolist() == [72, 99, 51, 61]
    assert verdict.firsts.tolist() == [0, 3, 7, 8]
    assert sampled[verdict.kept_rows()].tolist() == [70, 71, 72, 30, 99, 51, 61]


def test_random_verdicts_equal_plain_loops() -> None:
    chance = random.Random(1)
    for _ in range(200):
        rows, wanted, counts = [], [], []
        state = make_state([[chance.randrange(3) for _ in range(12)] for _ in range(4)])
        order = chance.sample(range(4), chance.randint(1, 4))
        for slot in order:
            num_drafts, first = chance.randint(0, 5), chance.randint(1, 6)
            sampled = [(slot, first + offset, chance.randrange(3)) for offset in range(num_drafts + 1)]
            kept = next((i for i, (_, place, token) in enumerate(sampled[:-1]) if state.tokens[slot, place] != token), num_drafts)
            rows += sampled
            counts.append(num_drafts)
            wanted.append([token for _, _, token in sampled[: kept + 1]])
        slots, places, tokens = (np.array(column, np.int64) for column in zip(*rows))
        verdict = verify_by_match(state, slots, places, tokens.astype(np.int32), np.array(counts))
        assert verdict.slots.tolist() == order
        assert (verdict.num_accepted + 1).tolist() == [len(one) for one in wanted]
        assert verdict.next_tokens.tolist() == [one[-1] for one in wanted]
        assert tokens[verdict.kept_rows()].tolist() == [token for one in wanted for token in one]
