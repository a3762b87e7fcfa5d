"""Which copies of experts there are and which rank has them: arithmetic."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from zspmd.config import ParallelConfig
from zspmd.errors import ConfigError
from zspmd.expert_placement import (
    balance_experts,
    check_movable,
    check_placement,
    check_redundant_experts,
    copies_of_rank,
    first_placement,
    loads_of_ranks,
)
from zspmd.mixture_config import MixtureConfig

MIXTURE = MixtureConfig(layers=(0,), num_experts=7, top_k=2, expert_size=8)


def test_the_first_placement_is_each_expert_once_and_then_the_first_ones_again() -> None:
    assert first_placement(7, 0) == tuple(range(7))
    placement = first_placement(7, 1)
    assert [copies_of_rank(placement, rank, 2) for rank in range(2)] == [(0, 1, 2, 3), (4, 5, 6, 0)]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 8])
def test_no_rank_begins_with_two_copies_of_an_expert(num_ranks: int) -> None:
    for num_redundant in range(7 * (num_ranks - 1) + 1):
        placement = first_placement(7, num_redundant)
        held = [copies_of_rank(placement, rank, num_ranks) for rank in range(num_ranks)]
        assert all(len(set(experts)) == len(experts) for experts in held)


def test_work_is_shared_among_the_copies_of_an_expert() -> None:
    assert loads_of_ranks((0, 1, 2, 0), [10, 4, 3], 2) == [9.0, 8.0]


def test_the_hottest_expert_gets_the_copy_and_the_ranks_equal_work() -> None:
    before = first_placement(4, 2)
    after = balance_experts(before, [1, 90, 1, 32], 2)
    assert Counter(after) == {0: 1, 1: 2, 2: 1, 3: 2}
    assert max(loads_of_ranks(before, [1, 90, 1, 32], 2)) == 77.5
    assert loads_of_ranks(after, [1, 90, 1, 32], 2) == [62.0, 62.0]


def test_what_stays_on_a_rank_stays_in_its_place() -> None:
    before = first_placement(6, 0)
    after = balance_experts(before, [50, 50, 50, 10, 10, 10], 2)
    assert [sum(old == new for old, new in zip(before[i : i + 3], after[i : i + 3])) for i in (0, 3)] == [2, 2]


def test_nothing_moves_for_nothing() -> None:
    placement = first_placement(8, 0)
    assert balance_experts(placement, [0] * 8, 4) is placement
    assert balance_experts(placement, [5] * 8, 4) is placement
    after = balance_experts(placement, [100, 90, 5, 5, 5, 5, 5, 5], 4)
    assert after != placement
    assert balance_experts(after, [100, 90, 5, 5, 5, 5, 5, 5], 4) is after


def test_any_loads_give_a_placement_that_is_whole_and_no_worse() -> None:
    chance = random.Random(3)
    num_better = 0
    for _ in range(300):
        num_experts, num_ranks = chance.randint(1, 12), chance.randint(2, 6)
        before = first_placement(num_experts, chance.randint(0, num_experts * (num_ranks - 1)))
        for _ in range(3):
            loads = [int(chance.paretovariate(0.7) * 10) for _ in range(num_experts)]
            after = balance_experts(before, loads, num_ranks)
            assert check_placement(after, num_experts, len(before)) == after
            assert max(loads_of_ranks(after, loads, num_ranks)) <= max(loads_of_ranks(before, loads, num_ranks))
            num_better += after is not before
            before = after
    assert num_better > 300


@pytest.mark.parametrize(
    "placement", [(0, 1, 2), (0, 1, 2, 1, 0), (0, 1, 1, 1), (0, 1, 2, 3), (0, 1, 2, -1)], ids=["few", "many", "missing", "high", "low"]
)
def test_a_placement_that_is_none_is_refused(placement: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="it must have 4, of 3 experts each at least once"):
        check_placement(placement, 3, 4)


def test_experts_move_where_several_ranks_have_some() -> None:
    check_movable(MIXTURE, ParallelConfig(tp=2))
    check_movable(MIXTURE, ParallelConfig(dp=2, ep=2))
    with pytest.raises(ConfigError, match="nothing to rebalance: the model has no experts"):
        check_movable(None, ParallelConfig(tp=2))
    with pytest.raises(ConfigError, match="nothing to rebalance: each replica has all experts on one rank"):
        check_movable(MIXTURE, ParallelConfig(dp=2))


@pytest.mark.parametrize(
    ("mixture", "num_redundant", "parallel", "message"),
    [
        pytest.param(None, 1, ParallelConfig(tp=2), "redundant_experts is 1, and the model has no experts: leave it out", id="dense"),
        pytest.param(MIXTURE, 1, ParallelConfig(dp=2), "over 1 ranks, of which .*: leave it out", id="one-rank"),
        pytest.param(MIXTURE, 8, ParallelConfig(tp=2), "redundant_experts is 8; .* over 2 ranks, .*: choose at most 7", id="two-ranks"),
        pytest.param(MIXTURE, 22, ParallelConfig(tp=2, dp=2, ep=4), "over 4 ranks, .*: choose at most 21", id="four-ranks"),
    ],
)
def test_copies_that_nobody_has_use_for_are_refused(
    mixture: MixtureConfig | None, num_redundant: int, parallel: ParallelConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_redundant_experts(mixture, num_redundant, parallel)
    check_redundant_experts(mixture, num_redundant - 1, parallel)
