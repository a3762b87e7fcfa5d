"""What the driver measures of speculation: what steps of each depth cost, which the ranks' policy is told, and what came of the drafts."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .plan import ScheduledStep
from .statistics import SpeculationStatistics
from .step_costs import StepCosts
from .step_values import Verified


class SpeculationMeter:
    """Follows the steps of an engine that speculates.

    Args:
        k: drafts of a row at most.
        num_replicas: each has costs of its own.
    """

    def __init__(self, k: int, num_replicas: int) -> None:
        self._replicas = [_Replica() for _ in range(num_replicas)]
        self._num_steps = self._num_rows = 0
        self._drafted, self._accepted = np.zeros(k, np.int64), np.zeros(k, np.int64)
        self._propose_ns = self._target_ns = 0

    def published(self, step: ScheduledStep) -> None:
        """Add to a step, just before it is published, what its replica's ranks are to know of costs."""
        step.published_at = time.monotonic()
        costs = self._replicas[step.replica].costs.changes()
        if costs:
            step.batch = replace(step.batch, costs=tuple(costs))

    def answered(self, step: ScheduledStep, answer: Verified) -> None:
        """Take note of an answer that is there now."""
        replica, now = self._replicas[step.replica], time.monotonic()
        began, replica.answered_at = max(step.published_at, replica.answered_at), now
        if not step.num_decodes:
            return
        depth, propose_ns, target_ns = answer.report
        self._propose_ns += propose_ns
        self._target_ns += target_ns
        num_rows = step.num_decodes
        if answer.counts is not None and answer.num_drafts is not None:
            counts, num_drafts = answer.counts[-step.num_decodes :], answer.num_drafts[-step.num_decodes :]
            decoded = counts > 0  # the others had all their tokens
            num_rows = int(decoded.sum())
            if depth:
                self._num_steps += 1
                self._num_rows += num_rows
                self._drafted += _by_position(num_drafts[decoded], len(self._drafted))
                self._accepted += _by_position(counts[decoded] - 1, len(self._accepted))
        if num_rows:
            if len(step.sampled) == step.num_decodes and not step.unsampled:
                replica.costs.record(num_rows, depth, now - began, follows_change=depth > 0 == replica.depth)
            replica.depth = depth

    def restarted(self) -> None:
        """Tell everything again: the ranks are others."""
        for replica in self._replicas:
            replica.costs.reset()
            replica.depth = -1

    def statistics(self) -> SpeculationStatistics:
        """Return the counters."""
        return SpeculationStatistics(
            num_steps=self._num_steps,
            num_rows=self._num_rows,
            drafted=tuple(self._drafted.tolist()),
            accepted=tuple(self._accepted.tolist()),
            propose_s=self._propose_ns * 1e-9,
            target_s=self._target_ns * 1e-9,
        )


class _Replica:
    """What is measured of one replica."""

    def __init__(self) -> None:
        self.costs = StepCosts()
        self.answered_at = 0.0
        self.depth = -1  # of its latest step


def _by_position(lengths: npt.NDArray[np.uint8], num_positions: int) -> npt.NDArray[np.int64]:
    """Return int64 [num_positions], how many of ``lengths`` reach beyond each position."""
    ends = np.bincount(lengths, minlength=num_positions + 1)
    beyond: npt.NDArray[np.int64] = ends[::-1].cumsum()[::-1][1:]
    return beyond
