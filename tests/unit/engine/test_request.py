"""Sequence: its tokens, counters and digests."""

from __future__ import annotations

import numpy as np
import pytest

from zspmd.config import SamplingParams
from zspmd.errors import RequestError
from zspmd.runtime.engine.request import Sequence


def build(prompt: object, **facts: object) -> Sequence:
    return Sequence("s", "r", prompt, SamplingParams(), seed=0, **facts)  # type: ignore[arg-type]  # bad prompts on purpose


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        ([[1, 2]], "flat list"),
        ([1.5], "whole numbers"),
        ([3, -1], "token id -1 of a prompt"),
        ([1 << 31], "token id 2147483648 of a prompt"),
    ],
    ids=["empty", "nested", "fractions", "negative", "too large"],
)
def test_a_bad_prompt_is_refused_by_name(prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        build(prompt)
    assert caught.value.request_id == "r"


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(0, None, [5, 6, 7, 8, 9]), (1, 3, [6, 7]), (2, 4, [7, 8]), (3, 5, [8, 9]), (4, 5, [9])],
    ids=["all", "prompt", "across", "outputs", "last"],
)
def test_token_ids_cut_prompt_and_outputs_alike(start: int, stop: int | None, expected: list[int]) -> None:
    sequence = build([5, 6, 7])
    sequence.output_token_ids += [8, 9]
    tokens = sequence.token_ids(start, stop)
    assert tokens.tolist() == expected
    assert tokens.dtype == np.int32


def test_in_flight_is_what_was_sampled_and_is_not_back() -> None:
    sequence = build([5, 6, 7])
    sequence.num_tokens += 2
    sequence.output_token_ids.append(8)
    assert (sequence.num_known, sequence.num_in_flight) == (4, 1)


def test_digests_grow_with_known_tokens_and_never_change() -> None:
    sequence = build([1, 2, 3])
    before = list(sequence.block_digests(2))
    sequence.output_token_ids += [4, 5]
    after = sequence.block_digests(2)
    assert (len(before), len(after)) == (1, 2)
    assert after == build([1, 2, 3, 4]).block_digests(2)
    assert after[:1] == before
    assert build([1, 2], cache_salt=b"x").block_digests(2) != before
