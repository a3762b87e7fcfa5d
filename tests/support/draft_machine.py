"""A machine that speculates, in arithmetic: what a depth policy costs, against always the same depth.

A step of n sequences at depth K computes n (1 + K) rows of the target, which takes ``base + per_row * rows``. A draft model takes
``draft`` times what the target would, K times for n rows, and once for what it has not seen yet. Times are noisy, the driver's measurements
reach the policy a few steps later, and what was accepted is known at once or, as with pipeline stages, some steps later. What the policy
sees is drawn; the time and the tokens of a run are counted at what is expected, so that short runs compare.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from zspmd.runtime.engine.step_costs import StepCosts
from zspmd.transport.step_cost import StepCost
from zspmd.workers.speculation.depth import DepthPolicy

I64Array = npt.NDArray[np.int64]
LAG = 3  # steps until a measurement reaches the ranks: the window of steps in flight


@dataclass
class DraftMachine:
    """The machine and what it is asked; times are in units of ``base``, 1 ms.

    Args:
        per_row: what a row adds: 0.002 is memory bound, 0.1 compute bound.
        draft: what the draft takes of the target's time; 0 for a proposer without a model.
        acceptance: of a draft at some token (counted for one sequence), given those before it.
        proposes: the share of sequences for which something is proposed.
        sequence_length: tokens after which a sequence ends, and another begins of which the draft knows all.
        noise: of a measurement, relative. It deceives the policy, and costs nothing itself.
        spikes: the share of measurements that are three times as long.
        observe_lag: steps until it is known what was accepted.
    """

    num_sequences: int
    acceptance: Callable[[float], float]
    per_row: float = 0.02
    draft: float = 0.1
    proposes: float = 1.0
    sequence_length: int = 256
    noise: float = 0.1
    spikes: float = 0.0
    observe_lag: int = 0
    seed: int = 0

    def run(self, policy: DepthPolicy, num_tokens: int, costs: StepCosts | None = None) -> tuple[float, list[int]]:
        """Return the time for so many tokens a sequence, on average, and the depth of each step."""
        random = np.random.default_rng(self.seed)
        costs = costs or StepCosts()
        published: deque[list[StepCost]] = deque([[]] * LAG)
        observed: deque[tuple[I64Array, int]] = deque()
        time, tokens, behind, depths = 0.0, 0.0, 0.0, [0]
        while tokens < num_tokens:
            policy.take_costs(published.popleft())
            depth = policy.choose(self.num_sequences)
            num_drafts = np.where(random.random(self.num_sequences) < self.proposes, depth, 0)
            acceptance = self.acceptance(tokens)
            num_accepted = self._accept(random, num_drafts, acceptance)
            duration = self._duration(depth, behind if depth else 0.0)
            costs.record(self.num_sequences, depth, duration / 1000 * self._noise(random), follows_change=depth > 0 and depths[-1] == 0)
            published.append(costs.changes())
            observed.append((num_accepted, depth))
            if len(observed) > self.observe_lag:
                earlier, its_depth = observed.popleft()
                policy.observe(earlier, depths=its_depth)
            gained = self._gain(depth, acceptance)
            behind = 0.0 if depth else (behind + gained) * (1 - gained / self.sequence_length)
            time, tokens = time + duration, tokens + gained
            depths.append(depth)
        return time, depths[1:]

    def steady_time(self, depth: int, num_tokens: float, acceptance: float) -> float:
        """Return the time for so many tokens a sequence at always the same depth."""
        return num_tokens * self._duration(depth, 0.0) / self._gain(depth, acceptance)

    def _gain(self, depth: int, acceptance: float) -> float:
        return 1 + self.proposes * sum(acceptance**place for place in range(1, depth + 1))

    def _accept(self, random: np.random.Generator, num_drafts: I64Array, acceptance: float) -> I64Array:
        depth = int(num_drafts.max())
        is_accepted = random.random((self.num_sequences, depth)) < acceptance
        num_accepted: I64Array = np.minimum(np.cumprod(is_accepted, axis=1).sum(axis=1), num_drafts)
        return num_accepted

    def _duration(self, depth: int, behind: float) -> float:
        rows = self.num_sequences
        target = 1 + self.per_row * rows * (1 + self.proposes * depth)
        return target + self.draft * (depth * (1 + self.per_row * rows) + self.per_row * rows * behind)

    def _noise(self, random: np.random.Generator) -> float:
        return max(0.5, 1 + self.noise * random.standard_normal()) * (3 if random.random() < self.spikes else 1)
