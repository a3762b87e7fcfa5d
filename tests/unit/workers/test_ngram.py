"""The n-gram proposer against the rule in plain Python, on short and on long histories."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zspmd.workers.speculation.ngram import NgramProposer


def propose_plainly(history: list[int], k: int, min_n: int, max_n: int, most: int) -> list[int]:
    for length in range(max_n, min_n - 1, -1):
        for start in range(len(history) - length - 1, -1, -1):
            if history[start : start + length] == history[len(history) - length :]:
                return history[start + length : start + length + min(k, most)]
    return []


def propose(history: list[int], k: int = 4, min_n: int = 2, max_n: int = 4, most: int = 100) -> list[int]:
    proposed = NgramProposer(k, min_n, max_n).propose_one(np.array(history, np.int32), most)
    assert proposed.dtype == np.int32
    return [int(token) for token in proposed]


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.integers(0, 3).flatmap(lambda largest: st.lists(st.integers(0, largest), max_size=16)),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 3),
    st.integers(0, 6),
)
def test_proposals_equal_the_plain_rule(history: list[int], k: int, min_n: int, extra: int, most: int) -> None:
    assert propose(history, k, min_n, min_n + extra, most) == propose_plainly(history, k, min_n, min_n + extra, most)


CASES: dict[str, tuple[list[int], list[int]]] = {
    "empty": ([], []),
    "one-token": ([5], []),
    "too-short-for-a-suffix": ([5, 5], []),
    "no-occurrence": ([1, 2, 3, 4, 5, 6], []),
    "suffix-too-short": ([3, 7, 8, 9, 3], []),
    "two": ([1, 2, 7, 8, 9, 6, 5, 1, 2], [7, 8, 9, 6]),
    "longest-wins-over-latest": ([1, 2, 3, 7, 7, 9, 2, 3, 8, 8, 1, 2, 3], [7, 7, 9, 2]),
    "latest-of-the-longest": ([1, 2, 7, 1, 2, 8, 1, 2], [8, 1, 2]),
    "overlap": ([4, 4, 4, 4], [4]),
    "period-two": ([6, 5, 6, 5, 6, 5], [6, 5]),
    "large-ids": ([2**31 - 1, 0, 9, 2**31 - 1, 0], [9, 2**31 - 1, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name: str) -> None:
    history, expected = CASES[name]
    assert propose(history) == expected
    assert propose_plainly(history, 4, 2, 4, 100) == expected


@pytest.mark.parametrize(("history", "expected"), [([], []), ([3], []), ([3, 4], []), ([3, 3], [3]), ([3, 5, 4, 3], [5, 4, 3])], ids=str)
def test_suffixes_of_one_token(history: list[int], expected: list[int]) -> None:
    assert propose(history, min_n=1) == expected


def test_an_occurrence_may_be_all_but_the_last_token() -> None:
    assert propose([4, 4, 4]) == [4]
    assert propose([4, 4, 4, 4], min_n=3) == [4]


@pytest.mark.parametrize("most", [0, 1, 3, 9])
def test_no_more_is_proposed_than_there_is_room_for(most: int) -> None:
    assert propose([1, 2, 7, 8, 9, 6, 5, 1, 2], most=most) == [7, 8, 9, 6][:most]


def test_bytes_that_match_within_tokens_do_not_count() -> None:
    assert propose([256] * 50 + [65536] * 2 + [3] + [65536] * 2) == [3, 65536, 65536]


def test_a_suffix_of_sixteen_in_a_long_history() -> None:
    rng = np.random.default_rng(4)
    history = rng.integers(0, 30_000, 32_768).tolist()
    history[-16:] = history[999:1015]
    assert propose(history, max_n=16) == history[1015:1019]
