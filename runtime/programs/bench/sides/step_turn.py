"""One turn of steps: what is asked of a side, and what it answers; both ends of the same line of JSON."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..meter import Meter


@dataclass(frozen=True)
class StepRequest:
    """What a side is to do: at most ``steps`` steps, or as many as ``limit_s`` lets it.

    Attributes:
        payload: bytes of a step.
        window: how many steps are in flight; 1 measures round trips.
        variant: of the side's program, where it has several.
    """

    payload: int
    steps: int
    limit_s: float
    window: int = 1
    variant: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


class TurnMeter:
    """Measures what a turn takes of the driver's thread, and of all threads of both ends."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._meter = Meter([os.getpid(), *pids])

    def begin(self) -> None:
        """Read the counters before the turn."""
        self._all, self._own_ns, self._began_ns = self._meter.read(), time.thread_time_ns(), time.perf_counter_ns()

    def finished(self, times_us: list[float], num_steps: int, *, is_pipelined: bool) -> dict[str, Any]:
        """Return the answer; a pipelined turn has one sample, its time over its steps."""
        elapsed_us = (time.perf_counter_ns() - self._began_ns) / 1000
        own_us = (time.thread_time_ns() - self._own_ns) / 1000
        spent_us, switches = (after - before for before, after in zip(self._all, self._meter.read()))
        samples = [elapsed_us / num_steps] if is_pipelined else times_us
        return {"times_us": samples, "driver us": own_us / num_steps, "all us": spent_us / num_steps, "wake-ups": switches / num_steps}
