"""Everything that a simulated run has in common: its clock, its chance, what is due, and what has been reached."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

START_S = 1000.0


@dataclass(frozen=True)
class Root:
    """A failure that no other explains: ``rank`` is None where it is no rank's; ``what`` is a counter's name."""

    at: float
    what: str
    rank: int | None


class World:
    """Virtual time, and what happens in it outside the driver's event loop: frames that arrive, ranks that work, beat and die.

    Time only moves in ``advance``, and every choice comes from ``chance``: one seed is one run.
    """

    def __init__(self, seed: int) -> None:
        self.now = START_S
        self.chance = random.Random(seed)
        self.reached: Counter[str] = Counter()
        self.roots: list[Root] = []
        self.violations: list[str] = []
        self.trace: list[tuple[float, str]] = []
        self.driver_stopped_until = 0.0  # all of its threads, as by SIGSTOP
        self.driver_paused_until = 0.0  # its event loop, by that or alone
        self.paused_s = 0.0  # of the driver, in all
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = itertools.count()

    @property
    def next_at(self) -> float:
        """When something happens next; infinite if nothing does."""
        return self._queue[0][0] if self._queue else math.inf

    def at(self, when: float, action: Callable[..., None], *args: Any) -> None:
        """Have ``action`` called when time has come to ``when``; things of one moment happen in the order in which they were asked for."""
        heapq.heappush(self._queue, (when, next(self._count), action, args))

    def after(self, delay_s: float, action: Callable[..., None], *args: Any) -> None:
        """Have ``action`` called ``delay_s`` from now."""
        heapq.heappush(self._queue, (self.now + delay_s, next(self._count), action, args))

    def advance(self, when: float) -> None:
        """Move time to ``when``, through all that happens until then."""
        queue, pop = self._queue, heapq.heappop
        while queue and queue[0][0] <= when:
            at, _, action, args = pop(queue)
            if at > self.now:
                self.now = at
            action(*args)
        if when > self.now:
            self.now = when

    def happens(self, probability: float) -> bool:
        """Draw once."""
        return probability > 0 and self.chance.random() < probability

    def note(self, what: str) -> None:
        """Write into the trace, which is compared between runs and printed for a seed that fails."""
        self.trace.append((self.now - START_S, what))

    def reach(self, counter: str, detail: str = "") -> None:
        """Count that a path was taken."""
        self.reached[counter] += 1
        self.note(f"{counter} {detail}")

    def fail_root(self, what: str, rank: int | None = None) -> None:
        """Note a failure that the driver may name as the first cause."""
        self.reach(what, "" if rank is None else f"of rank {rank}")
        self.roots.append(Root(self.now, what, rank))

    def violate(self, text: str) -> None:
        """Note that an invariant does not hold."""
        self.note(f"VIOLATION {text}")
        self.violations.append(f"at {self.now - START_S:.4f} s: {text}")

    def stop_driver(self, duration_s: float) -> None:
        """Pause the driver's process with all of its threads: nothing arrives meanwhile."""
        self.reach("driver_stopped", f"for {duration_s:.3f} s")
        self.driver_stopped_until = max(self.driver_stopped_until, self.now + duration_s)
        self.driver_paused_until = max(self.driver_paused_until, self.driver_stopped_until)
        self.paused_s += duration_s

    def block_driver(self, duration_s: float) -> None:
        """Keep the driver's loop busy: frames arrive, and nobody reads them."""
        self.reach("driver_blocked", f"for {duration_s:.3f} s")
        self.driver_paused_until = max(self.driver_paused_until, self.now + duration_s)
        self.paused_s += duration_s
