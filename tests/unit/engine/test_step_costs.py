"""StepCosts: what a step takes, and when that is told."""

from __future__ import annotations

import pytest

from zspmd.errors import InternalError
from zspmd.runtime.engine.step_costs import StepCosts
from zspmd.transport.step_cost import CATCH_UP, MAX_DURATION_US, StepCost, batch_bucket


def record(costs: StepCosts, *durations_ms: float, num_sequences: int = 1, depth: int = 0, follows_change: bool = False) -> None:
    for duration_ms in durations_ms:
        costs.record(num_sequences, depth, duration_ms / 1000, follows_change=follows_change)


def changes_within(costs: StepCosts, num_steps: int) -> list[StepCost]:
    return [cost for _ in range(num_steps) for cost in costs.changes()]


@pytest.mark.parametrize(
    ("num_sequences", "bucket"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (9, 4), (32, 5), (33, 6), (65_535, 16)]
)
def test_buckets_are_powers_of_two(num_sequences: int, bucket: int) -> None:
    assert batch_bucket(num_sequences) == bucket


def test_a_new_cell_is_told_at_once_and_only_once() -> None:
    costs = StepCosts()
    record(costs, 2, num_sequences=3)
    record(costs, 5, num_sequences=4, depth=4)
    assert costs.changes() == [(2, 0, 2000), (2, 4, 5000)]
    assert changes_within(costs, 100) == []


def test_each_size_of_batch_has_its_own_cells() -> None:
    costs = StepCosts()
    record(costs, 1, num_sequences=1)
    record(costs, 2, num_sequences=2)
    assert costs.changes() == [(0, 0, 1000), (1, 0, 2000)]


def test_what_moved_is_told_now_and_then() -> None:
    costs = StepCosts(publish_every=4)
    record(costs, 1)
    costs.changes()
    told = []
    for _ in range(40):
        record(costs, 2)
        told.append(costs.changes())
    assert [place for place, cells in enumerate(told) if cells] == [3], "after four steps, and it moved once"
    assert told[3] == [(0, 0, 2000)]


def test_small_moves_are_not_told() -> None:
    costs = StepCosts(publish_every=1)
    record(costs, 1)
    costs.changes()
    for _ in range(50):
        record(costs, 1.04)
        assert costs.changes() == []
    record(costs, *[1.06] * 50)
    assert costs.changes() == [(0, 0, 1060)]


def test_single_long_steps_do_not_count() -> None:
    costs = StepCosts(publish_every=1)
    record(costs, 30, 1)  # the first is one of them
    costs.changes()
    for _ in range(30):
        record(costs, 1, 1, 1, 30)
    assert costs.changes() == []


def test_the_first_step_after_a_pause_is_kept_apart() -> None:
    costs = StepCosts()
    record(costs, 9, depth=4, follows_change=True)
    record(costs, 2, depth=4)
    assert costs.changes() == [(0, CATCH_UP, 9000), (0, 4, 2000)]
    record(costs, 20, depth=4, follows_change=True)
    assert changes_within(costs, 16) == [(0, CATCH_UP, 20_000)], "the last one, not a mean"


def test_what_was_not_measured_for_long_begins_anew() -> None:
    costs = StepCosts()
    record(costs, *[1] * 20)
    record(costs, *[3] * 300, depth=4)
    costs.changes()
    record(costs, 2)
    assert changes_within(costs, 16) == [(0, 0, 2000)]


def test_new_ranks_are_told_everything() -> None:
    costs = StepCosts()
    record(costs, 1)
    record(costs, 2, depth=4)
    costs.changes()
    costs.reset()
    assert costs.changes() == [(0, 0, 1000), (0, 4, 2000)]
    empty = StepCosts()
    empty.reset()
    assert empty.changes() == []


def test_durations_fit_the_wire() -> None:
    costs = StepCosts()
    record(costs, 0.0001)
    record(costs, 1e9, depth=4)
    assert costs.changes() == [(0, 0, 1), (0, 4, MAX_DURATION_US)]


@pytest.mark.parametrize(("num_sequences", "depth"), [(0, 4), (1, -1), (1, CATCH_UP)], ids=["no-sequence", "negative", "reserved"])
def test_steps_that_cannot_be_are_refused(num_sequences: int, depth: int) -> None:
    costs = StepCosts()
    with pytest.raises(InternalError, match="a step of"):
        costs.record(num_sequences, depth, 0.001, follows_change=False)
    assert costs.changes() == []
