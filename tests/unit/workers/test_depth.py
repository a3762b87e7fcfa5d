"""How deep to speculate: what each policy chooses, and what goodput costs against never and always drafting.

Where times are compared they are those of ``DraftMachine``, an arithmetic of steps: no clock is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from support.draft_machine import DraftMachine

from zspmd.errors import BadFrameError
from zspmd.speculation_config import NgramConfig, SpeculationConfig
from zspmd.transport.step_cost import CATCH_UP, StepCost, batch_bucket
from zspmd.workers.speculation.acceptance import Acceptance
from zspmd.workers.speculation.depth import DepthPolicy, FixedDepth, build_depth_policy
from zspmd.workers.speculation.goodput import GoodputDepth

K = 4
PER_ROW = (0.002, 0.02, 0.1)  # of the target's time without rows: at 32 sequences and K = 4, 160 rows add 0.3, 3.2 and 16 of it
DRAFTS = (0.0, 0.1, 0.3)  # the draft's part of the target's time, none for n-grams
LONG = 2000  # tokens a sequence

every_batch = pytest.mark.parametrize("num_sequences", [1, 8, 32], ids="batch-{}".format)


def costs_of(*durations: int, bucket: int = 0, catch_up: int | None = None) -> list[StepCost]:
    cells = list(enumerate(durations)) + ([] if catch_up is None else [(CATCH_UP, catch_up)])
    return [StepCost(bucket, depth, duration) for depth, duration in cells]


def play(policy: DepthPolicy, num_steps: int, accepts: Callable[[int], int], num_sequences: int = 1) -> list[int]:
    """Have as many steps with ``accepts(K)`` tokens accepted of each sequence, and return their depths."""
    depths = []
    for _ in range(num_steps):
        depth = policy.choose(num_sequences)
        policy.observe(np.full(num_sequences, accepts(depth)), depths=depth)
        depths.append(depth)
    return depths


def accept_all(depth: int) -> int:
    return depth


def accept_none(depth: int) -> int:
    return 0


# the policies


def test_fixed_depth() -> None:
    policy = build_depth_policy(SpeculationConfig(NgramConfig(k=3), policy="fixed"))
    policy.take_costs(costs_of(1, 1, 1, 1000))
    assert play(policy, 50, accept_none) == [3] * 50


def test_depth_by_batch() -> None:
    policy = build_depth_policy(SpeculationConfig(NgramConfig(k=6), policy="batch", depths=((4, 6), (16, 3))))
    policy.take_costs(costs_of(1, 1000))
    policy.observe(np.zeros(4, np.int64), depths=6)
    assert [policy.choose(n) for n in (1, 4, 5, 16, 17, 1000)] == [6, 6, 3, 3, 0, 0]


def test_goodput_is_built_with_the_proposers_k() -> None:
    policy = build_depth_policy(SpeculationConfig(NgramConfig(k=7)))
    assert isinstance(policy, GoodputDepth)
    assert policy.choose(1) == 7


@pytest.mark.parametrize("cost", [StepCost(0, K + 1, 10), StepCost(0, -1, 10), StepCost(0, K, 0)], ids=["too-deep", "negative", "no-time"])
def test_costs_that_cannot_be_are_refused(cost: StepCost) -> None:
    with pytest.raises(BadFrameError, match=f"depth {cost.depth} takes {cost.duration_us} us; depths are 0 to {K}"):
        GoodputDepth(K).take_costs([cost])


# what is expected of a draft


def test_expected_tokens_of_independent_drafts() -> None:
    random, acceptance = np.random.default_rng(1), Acceptance(K)
    for _ in range(200):
        acceptance.observe(np.cumprod(random.random((64, K)) < 0.6, axis=1).sum(axis=1), K)
    assert acceptance.expected == pytest.approx([1, 1.6, 1.96, 2.176, 2.3056], rel=0.1)


def test_a_sequence_without_proposal_counts_as_one_that_gains_a_token() -> None:
    acceptance = Acceptance(K)
    for _ in range(100):
        acceptance.observe(np.array([K, 0, 0, 0]), K)
    assert acceptance.expected == pytest.approx([1, 1.25, 1.5, 1.75, 2], rel=0.05)


def test_depths_that_were_not_reached_keep_what_was_known() -> None:
    acceptance = Acceptance(2)
    for _ in range(100):
        acceptance.observe(np.full(8, 2), 2)
    before = acceptance.expected
    for _ in range(100):
        acceptance.observe(np.ones(8, np.int64), 1)
        acceptance.observe(np.zeros(8, np.int64), 0)
    assert acceptance.expected == pytest.approx(before, rel=0.02)


def test_sequences_of_several_steps_are_counted_each_at_its_depth() -> None:
    together, apart = Acceptance(K), Acceptance(K)
    accepted, depths = np.array([4, 0, 2, 1]), np.array([4, 0, 2, 3])
    together.observe(accepted, depths)
    tries = [(depths >= place) & (accepted >= place - 1) for place in range(1, K + 1)]
    expected, reached = [1.0], 1.0
    for place, tried in enumerate(tries, 1):  # two sequences of which one was accepted were known before: Laplace's rule
        keep = 64 / (64 + tried.sum())
        reached *= (keep + (tried & (accepted >= place)).sum()) / (2 * keep + tried.sum())
        expected.append(expected[-1] + reached)
    assert together.expected == pytest.approx(expected)
    apart.observe(accepted, 4)
    assert apart.expected != together.expected


def test_a_faded_memory_is_soon_changed() -> None:
    fresh, faded = Acceptance(1), Acceptance(1)
    for acceptance in (fresh, faded):
        acceptance.observe(np.zeros(64, np.int64), 1)
    faded.fade(2)
    assert faded.expected == fresh.expected
    for acceptance in (fresh, faded):
        acceptance.observe(np.ones(4, np.int64), 1)
    assert fresh.expected[1] < 1.2
    assert faded.expected[1] > 1.6


# goodput


def test_begins_with_drafts_and_then_without() -> None:
    assert play(GoodputDepth(K), 6, accept_none) == [K] * 4 + [0] * 2
    assert play(GoodputDepth(K), 4, accept_none, num_sequences=8) == [K] * 2 + [0] * 2


def test_takes_the_depth_of_the_largest_goodput() -> None:
    policy = GoodputDepth(K)
    policy.take_costs(costs_of(1000, 1100, 1200, 2900, 3000))  # a third draft does not fit
    depths = play(policy, 400, accept_all)
    assert np.bincount(depths).argmax() == 2


@pytest.mark.parametrize(("longest", "usual"), [(2200, 1), (7000, 0)], ids=["1300-us", "2500-us"])
def test_depths_that_were_not_measured_lie_on_a_line(longest: int, usual: int) -> None:
    """Of each draft the first token is accepted: the second one costs, and a step of one draft is worth 2000 us."""
    policy = GoodputDepth(K)
    policy.take_costs([StepCost(0, 0, 1000), StepCost(0, K, longest)])
    assert np.bincount(play(policy, 400, lambda depth: min(depth, 1))).argmax() == usual


def test_a_difference_within_the_hysteresis_changes_nothing() -> None:
    policy = GoodputDepth(1)
    policy.take_costs(costs_of(1000, 1500))
    play(policy, 200, accept_all)
    for duration, usual in ((1960, 1), (2050, 1), (2150, 0), (2050, 0), (1900, 1)):  # two tokens a step are worth 2000 us
        policy.take_costs(costs_of(1000, duration))
        assert np.bincount(play(policy, 100, accept_all)).argmax() == usual, duration


def test_useless_drafts_are_tried_again_after_a_time_in_proportion_to_their_cost() -> None:
    def waits(*, catch_up: int | None) -> list[int]:
        policy = GoodputDepth(K)
        policy.take_costs(costs_of(1000, 1250, 1500, 1750, 2000, bucket=3, catch_up=catch_up))
        depths = play(policy, 8000, accept_none, num_sequences=8)
        return [len(list(run)) for depth, run in itertools.groupby(depths[200:]) if depth == 0][1:-1]

    assert set(waits(catch_up=None)) <= set(range(755, 775)), (
        "two steps that lose 1000 us each, and at least 16 * 250 us to catch up, 128 times"
    )
    assert set(waits(catch_up=11_000)) <= set(range(1395, 1415)), "9000 us to catch up"


def test_plain_steps_are_measured_anew_while_drafting() -> None:
    policy = GoodputDepth(K)
    policy.take_costs(costs_of(1000, 1100, 1200, 1300, 1400))
    depths = play(policy, 1000, accept_all)
    assert 5 <= depths.count(0) <= 2 + 1000 / 32
    assert all(len(list(run)) <= 2 for depth, run in itertools.groupby(depths) if depth == 0)


@pytest.mark.parametrize(
    ("known", "longest", "then", "is_tried"),
    [(2, 1400, 8, True), (2, 9000, 8, False), (8, 9000, 2, True)],
    ids=["they-pay", "they-do-not", "they-do-not-in-a-larger"],
)
def test_a_new_size_of_batch_is_tried_unless_drafts_do_not_pay_in_a_smaller(known: int, longest: int, then: int, is_tried: bool) -> None:
    policy = GoodputDepth(K)
    policy.take_costs(costs_of(1000, longest - 300, longest - 200, longest - 100, longest, bucket=batch_bucket(known)))
    play(policy, 200, accept_all, num_sequences=known)
    depths = play(policy, 1100, accept_all, num_sequences=then)
    assert (K in depths[:4]) == is_tried
    assert K in depths[1020:], "some time it is tried anyway"


def test_a_new_size_of_batch_is_not_tried_where_nothing_is_accepted() -> None:
    policy = GoodputDepth(K)
    policy.take_costs(costs_of(1000, 1001, 1002, 1003, 1004))
    play(policy, 200, accept_none)
    assert set(play(policy, 1000, accept_none, num_sequences=8)) == {0}


def test_two_policies_that_are_fed_alike_choose_alike_and_no_more_than_k() -> None:
    random, policies = np.random.default_rng(3), [GoodputDepth(K), GoodputDepth(K)]
    seen = set()
    for _ in range(3000):
        num_sequences = int(random.choice([1, 2, 7, 8, 31, 32]))
        depths = [policy.choose(num_sequences) for policy in policies]
        assert depths[0] == depths[1]
        seen.add(depths[0])
        accepted = random.integers(0, depths[0] + 1, num_sequences)
        cells = random.integers([0, 0, 500], [6, K + 1, 5000], (int(random.integers(0, 3)), 3)).tolist()
        for policy in policies:
            policy.observe(accepted.copy(), depths=depths[0])
            policy.take_costs([StepCost(*cell) for cell in cells])
    assert seen == set(range(K + 1))


def test_what_is_kept_of_a_choice_changes_none() -> None:
    """Costs are looked at anew when some come in, be they none: one policy may go on as before, the other decides each step."""
    random, keeping, deciding = np.random.default_rng(4), GoodputDepth(K), GoodputDepth(K)
    depths = []
    for number in range(6000):
        num_sequences = 1 if number % 2000 < 1500 else int(random.choice([2, 3, 32]))
        deciding.take_costs([])
        depths.append(keeping.choose(num_sequences))
        assert deciding.choose(num_sequences) == depths[-1], number
        accepted = random.integers(0, depths[-1] + 1, num_sequences) // (1 + number // 2000)
        cells = [StepCost(*random.integers([0, 0, 900], [6, K + 1, 3000]).tolist())] if random.random() < 0.02 else []
        for policy in (keeping, deciding):
            if depths[-1]:
                policy.observe(accepted, depths=depths[-1])
            if cells:
                policy.take_costs(cells)
    assert {0, K} <= set(depths)


# what it costs


def machines(num_sequences: int, acceptance: float, **options: float) -> list[DraftMachine]:
    return [
        DraftMachine(num_sequences, lambda _: acceptance, per_row=per_row, draft=draft, **options)  # type: ignore[arg-type]
        for per_row in PER_ROW
        for draft in DRAFTS
    ]


def ratio(machine: DraftMachine, num_tokens: int, acceptance: float) -> float:
    """Return the time under goodput over the lesser of never and always drafting; the depth must not flutter."""
    best = min(machine.steady_time(depth, num_tokens, acceptance) for depth in (0, K))
    time, depths = machine.run(GoodputDepth(K), num_tokens)
    assert sum(a != b for a, b in itertools.pairwise(depths)) <= 10 + 0.1 * len(depths), machine
    return time / best


def test_the_machine_agrees_with_itself() -> None:
    machine = DraftMachine(8, lambda _: 0.5)
    for depth in (0, K):
        time, depths = machine.run(FixedDepth(depth), 500)
        assert set(depths) == {depth}
        assert time == pytest.approx(machine.steady_time(depth, 500, 0.5), rel=0.01)


@every_batch
@pytest.mark.parametrize(("acceptance", "limit"), [(0.02, 1.05), (0.5, 1.10), (0.9, 1.10)], ids=["useless", "middling", "good"])
def test_no_slower_than_the_better_of_off_and_fixed(num_sequences: int, acceptance: float, limit: float) -> None:
    for machine in machines(num_sequences, acceptance):
        assert ratio(machine, LONG, acceptance) <= limit, machine


@every_batch
@pytest.mark.parametrize("acceptance", [0.02, 0.5, 0.9])
def test_runs_of_a_hundred_steps(num_sequences: int, acceptance: float) -> None:
    """Single runs may lose more, by bad luck and by what a draft has to catch up; the mean over machines is held."""
    num_tokens = round(100 * sum(acceptance**place for place in range(K + 1)))
    ratios = [ratio(machine, num_tokens, acceptance) for seed in (0, 1) for machine in machines(num_sequences, acceptance, seed=seed)]
    assert np.mean(ratios) <= 1.10
    assert max(ratios) <= 1.25


@pytest.mark.parametrize(
    ("machine_options", "lag"),
    [({"per_row": 0.002, "draft": 0.0}, 0), ({"per_row": 0.02, "draft": 0.1}, 0), ({"per_row": 0.02, "draft": 0.1}, 4)],
    ids=["ngram", "draft", "draft-and-stages"],
)
@pytest.mark.parametrize(("before", "after"), [(0.9, 0.02), (0.02, 0.9)], ids=["good-to-bad", "bad-to-good"])
def test_a_change_of_the_text_is_followed(before: float, after: float, machine_options: dict[str, float], lag: int) -> None:
    machine = DraftMachine(8, lambda token: before if token < LONG else after, observe_lag=lag, **machine_options)  # type: ignore[arg-type]
    time, depths = machine.run(GoodputDepth(K), 2 * LONG)
    best = sum(min(machine.steady_time(depth, LONG, part) for depth in (0, K)) for part in (before, after))
    assert time <= 1.10 * best
    end = float(np.mean(depths[-len(depths) // 8 :]))
    assert end > 3 if after == 0.9 else end < 1


def test_measurements_that_are_wrong_now_and_then() -> None:
    for acceptance in (0.02, 0.9):
        ratios = [ratio(machine, LONG, acceptance) for machine in machines(8, acceptance, spikes=0.03)]
        assert np.mean(ratios) <= 1.10


def test_drafts_for_some_sequences_only() -> None:
    for machine in machines(8, 0.9, proposes=0.3):
        assert ratio(machine, LONG, 0.9) <= 1.10, machine
