"""The engine as a side of ``bench engine``: turns through ``Engine.generate``, each prompt with a consumer that takes every output."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ....config import SamplingParams
from ...driver.statistics import GroupStatistics
from ...engine.engine import Engine
from .generation import Turn, turn_from_times


@dataclass
class RankTimes:
    """When a rank had each step, and how long it was busy with it: what its answers say."""

    received_ns: list[int] = field(default_factory=list)
    busy_ns: list[int] = field(default_factory=list)

    def idle_share(self) -> float:
        """Return the share of the time from the first step to the end of the last in which the rank was at none."""
        if len(self.received_ns) < 2:
            return 0.0
        span = self.received_ns[-1] + self.busy_ns[-1] - self.received_ns[0]
        return 1.0 - sum(self.busy_ns) / span


class RankWatch:
    """Notes the times of a rank that answers steps, as the group counts them.

    Args:
        statistics: of the group whose only output rank it is.
    """

    def __init__(self, statistics: GroupStatistics) -> None:
        self._record = statistics.record
        self.times = RankTimes()
        statistics.record = self._note  # type: ignore[method-assign]  # of this one object, which the program owns

    def _note(self, asked_ns: int, published_ns: int, received_ns: int, busy_us: int, collected_ns: int) -> None:
        self.times.received_ns.append(received_ns)
        self.times.busy_ns.append(1000 * busy_us)
        self._record(asked_ns, published_ns, received_ns, busy_us, collected_ns)

    def begin(self) -> None:
        """Forget what was noted."""
        self.times = RankTimes()


async def run_arrivals(engine: Engine, prompts: Sequence[list[int]], num_output: int, arrivals_s: Sequence[float]) -> Turn:
    """Submit each prompt at its time, in seconds from now; the times of its tokens count from there."""
    started = time.perf_counter()
    params = SamplingParams(max_tokens=num_output, temperature=0.0, ignore_eos=True)
    tasks = [asyncio.create_task(_consume(engine, prompt, params, started + at)) for prompt, at in zip(prompts, arrivals_s)]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    return turn_from_times([times for times, _ in answers], [tokens for _, tokens in answers])


async def _consume(engine: Engine, prompt: list[int], params: SamplingParams, begin_at: float) -> tuple[list[float], list[int]]:
    """Take every output of a prompt; tokens that come together are there at the same time."""
    if (wait_s := begin_at - time.perf_counter()) > 0:
        await asyncio.sleep(wait_s)
        begin_at = time.perf_counter()
    times = list[float]()
    async for output in engine.generate(prompt, params):
        token_ids = output.token_ids
        times += [time.perf_counter() - begin_at] * (len(token_ids) - len(times))
    return times, token_ids


def poisson_arrivals(count: int, rate_per_s: float, seed: int) -> list[float]:
    """Return when requests come, in seconds: independently of each other, ``rate_per_s`` on average."""
    times: list[float] = np.cumsum(np.random.default_rng(seed).exponential(1 / rate_per_s, count)).tolist()
    return times
