"""The depth that yields most tokens a second: goodput, after SmartSpec (Liu et al., arXiv 2406.14066).

    goodput(K) = E(K) / T(K)        E: tokens that a sequence gains in a step of depth K, from what was accepted (``Acceptance``)
                                    T: what such a step takes, measured by the driver, for this number of sequences (``StepCost``)

A step takes the K of the largest goodput. E and T are estimates, and what is not done is not measured, so now and then a *trial* takes
another depth for a step or a few: no drafts while drafting, drafts while not. How often follows from what it costs: the time lost
in a trial is at most 1/128 of the time until the next. Where drafts are useless that is what they cost, and where trials are cheap, a
text that has become predictable is soon found out.

Everything is a function of the step stream: no clock, no chance, and only additions, products, quotients and comparisons of float64. Two
ranks that are fed alike choose alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from ...errors import BadFrameError
from ...transport.step_cost import CATCH_UP, StepCost, batch_bucket
from .acceptance import Acceptance, I64Array

_HYSTERESIS = 1.03  # by so much must another depth be better
_TRIAL_BUDGET = 128  # a trial may lose one part in so many of the time until the next
_MIN_WAIT = 32  # steps between trials
_TRIAL_SEQUENCES = 4  # a trial of drafts goes on until so many were verified, at least two steps: the first is spent on catching up
_FADED_SEQUENCES = 2  # what was known before a pause counts as so many
_TOKENS_BEHIND = 16  # that a draft model has to catch up in a trial, at least
_WORTH_A_TRIAL = 1.1  # E(k) above which drafts are tried at once in a bucket that is new
_NEW_BUCKET_WAIT = 1024  # steps until they are tried in one where they do not seem to be worth it


@dataclass
class _Bucket:
    """What is known of batches of one size."""

    costs: dict[int, int]
    durations: list[float]  # T(0) to T(k)
    depth: int = 0  # chosen last
    trial: list[int] = field(default_factory=list)  # depths of the steps to come
    num_trials: int = 0
    num_steps: int = 0  # since the last trial
    settled_for: int = 0  # sequences for which what was chosen last stands until ``next_trial``, or until something is learnt
    next_trial: float = 0.0  # in steps since the last


class GoodputDepth:
    """Chooses the depth of the largest goodput; see the module.

    Args:
        k: the largest depth, at least 1.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self._acceptance = Acceptance(k)
        self._buckets: dict[int, _Bucket] = {}
        self._num_without = 0  # steps without drafts, up to now

    def choose(self, num_sequences: int) -> int:
        """Return K for a step in which so many sequences decode, at least 1; called once for each such step."""
        bucket = self._bucket(batch_bucket(num_sequences))
        if not bucket.trial and (bucket.settled_for != num_sequences or bucket.num_steps >= bucket.next_trial):
            bucket.depth = self._best(bucket)
            self._plan_trial(bucket, num_sequences)
        bucket.num_steps += 1
        depth = bucket.trial.pop() if bucket.trial else bucket.depth
        if depth and self._num_without >= _MIN_WAIT:
            self._acceptance.fade(_FADED_SEQUENCES)
            self._unsettle()
        self._num_without = 0 if depth else self._num_without + 1
        return depth

    def observe(self, num_accepted: I64Array, *, depths: int | I64Array) -> None:
        """Learn what was accepted; as ``DepthPolicy.observe``."""
        self._acceptance.observe(num_accepted, depths)
        self._unsettle()

    def take_costs(self, costs: Iterable[StepCost]) -> None:
        """Learn what steps take; as ``DepthPolicy.take_costs``."""
        for index, depth, duration_us in costs:
            if not (0 <= depth <= self._k or depth == CATCH_UP) or duration_us < 1:
                raise BadFrameError(f"a step of depth {depth} takes {duration_us} us; depths are 0 to {self._k}, durations at least 1")
            bucket = self._bucket(index)
            bucket.costs[depth] = duration_us
            bucket.durations = _fill_in(bucket.costs, self._k)
        self._unsettle()

    def _unsettle(self) -> None:
        for bucket in self._buckets.values():
            bucket.settled_for = 0

    def _bucket(self, index: int) -> _Bucket:
        bucket = self._buckets.get(index)
        if bucket is None:
            bucket = self._buckets[index] = _Bucket({}, _fill_in({}, self._k))
        return bucket

    def _best(self, bucket: _Bucket) -> int:
        goodputs = [tokens / duration for tokens, duration in zip(self._acceptance.expected, bucket.durations)]
        best = max(range(self._k + 1), key=goodputs.__getitem__)
        return best if goodputs[best] > _HYSTERESIS * goodputs[bucket.depth] else bucket.depth

    def _plan_trial(self, bucket: _Bucket, num_sequences: int) -> None:
        """Begin a trial if one is due: in turn of the greatest depth and of none, of which one may be what is done anyway."""
        drafting = [self._k] * max(2, -(-_TRIAL_SEQUENCES // num_sequences))
        if bucket.num_trials == 0:
            trial = [0, 0, *drafting]  # from its end: both must be measured
            wait = 0.0 if self._is_worth_a_trial(batch_bucket(num_sequences)) else _NEW_BUCKET_WAIT
        else:
            trials = [trial for trial in (drafting, [0]) if trial[0] != bucket.depth]
            trial = trials[bucket.num_trials % len(trials)]
            wait = self._wait(bucket, trial)
        if bucket.num_steps < wait:
            bucket.settled_for, bucket.next_trial = num_sequences, wait
            return
        bucket.trial, bucket.num_trials, bucket.num_steps = trial, bucket.num_trials + 1, 0

    def _is_worth_a_trial(self, index: int) -> bool:
        """Say whether drafts may pay in a bucket that is new. If they do not in a smaller one, they hardly do in a larger."""
        smaller = [bucket for other, bucket in self._buckets.items() if other < index and self._k in bucket.costs and 0 in bucket.costs]
        return self._acceptance.expected[-1] >= _WORTH_A_TRIAL and all(self._best(bucket) for bucket in smaller)

    def _wait(self, bucket: _Bucket, trial: list[int]) -> float:
        """Return the steps after which a trial is due: what it takes longer than the chosen depth would for the same tokens, 128 times."""
        expected, durations = self._acceptance.expected, bucket.durations
        usual = durations[bucket.depth]
        lost = len(trial) * (durations[trial[0]] - expected[trial[0]] * usual / expected[bucket.depth])
        if bucket.depth == 0:
            of_a_draft = (durations[self._k] - durations[0]) / self._k
            lost += max(_TOKENS_BEHIND * of_a_draft, bucket.costs.get(CATCH_UP, 0) - durations[self._k])
        return max(_MIN_WAIT, _TRIAL_BUDGET * lost / usual)


def _fill_in(costs: dict[int, int], k: int) -> list[float]:
    """Return T(0) to T(k): what was measured, and straight lines between.

    Until both ends are measured, a step of depth K is taken to cost 1 + K/2 plain ones: between a proposer that is free with a target
    that reads its weights once, and a target whose time grows with each token.
    """
    measured = {depth: float(duration_us) for depth, duration_us in costs.items() if depth <= k}
    lowest = min(measured, default=0)
    plain = measured.get(lowest, 1.0) / (1 + lowest / 2)
    known = {0: plain, k: plain * (1 + k / 2), **measured}
    durations = [known[0]]
    for low, high in itertools.pairwise(sorted(known)):
        slope = (known[high] - known[low]) / (high - low)
        durations += [known[low] + slope * (depth - low) for depth in range(low + 1, high + 1)]
    return durations
