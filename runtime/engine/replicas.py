"""The schedulers of data-parallel replicas, seen as one: each replica has requests and KV blocks of its own.

    add ---> the replica where the request has to wait for the fewest tokens
    schedule <--- steps that are published together, each with up to ``window`` of its replica in flight

Replicas of a dense model share nothing, so that none waits for another: each step is published by itself, and the ranks of the other
replicas pass over it. Replicas that share experts compute in lockstep: what is published has a step of every replica that has work, and
the others take part with no tokens. There nothing is published until every replica has room: replicas whose requests began at different
times would take turns for ever otherwise, each idle in every other step. What a request costs a replica is what is before it there, and
the part of its prompt that is not in the replica's cache.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from .plan import ScheduledStep, Update
from .request import Sequence
from .scheduler import Scheduler
from .statistics import SchedulerStatistics


class Replicas:
    """Has what a ``Scheduler`` has, over one or more of them.

    Args:
        schedulers: one for each replica, in order; what they schedule names its replica.
        window: steps in flight of each.
        is_lockstep: whether the replicas share experts.
    """

    def __init__(self, schedulers: SequenceOf[Scheduler], window: int, *, is_lockstep: bool = False) -> None:
        self._schedulers = list(schedulers)
        self._window = window
        self._is_lockstep = is_lockstep
        self._next = 0  # the replica whose turn it is

    def has_work(self) -> bool:
        """Whether a sequence is unfinished or a step has not been applied."""
        return any(scheduler.has_work() for scheduler in self._schedulers)

    def add(self, *sequences: Sequence) -> None:
        """Queue the sequences of one request, all with one replica; raises as ``Scheduler.add``."""
        self._choose(sequences[0]).add(*sequences)

    def abort(self, sequence_id: str) -> bool:
        """End a sequence with the reason "abort"; False if it has finished already."""
        return self.finish(sequence_id, "abort")

    def finish(self, sequence_id: str, reason: str, stop_reason: int | str | None = None) -> bool:
        """As ``Scheduler.finish``."""
        return any(scheduler.finish(sequence_id, reason, stop_reason) for scheduler in self._schedulers)

    def run_only(self, request_ids: Collection[str] | None) -> None:
        """As ``Scheduler.run_only``."""
        for scheduler in self._schedulers:
            scheduler.run_only(request_ids)

    def reset(self) -> None:
        """As ``Scheduler.reset``: the ranks of all replicas are replaced together."""
        for scheduler in self._schedulers:
            scheduler.reset()

    def schedule(self) -> list[ScheduledStep]:
        """Decide what is published next: one step of the next replica that has room and work, or one of each; empty if none has."""
        if self._is_lockstep:
            return self._schedule_together()
        for place in range(self._next, self._next + len(self._schedulers)):
            scheduler = self._schedulers[place % len(self._schedulers)]
            step = scheduler.schedule() if scheduler.num_in_flight < self._window else None
            if step is not None:
                self._next = (step.replica + 1) % len(self._schedulers)
                return [step]
        return []

    def _schedule_together(self) -> list[ScheduledStep]:
        """Return a step of each replica that has work, once all have room."""
        if any(scheduler.num_in_flight >= self._window for scheduler in self._schedulers):
            return []
        steps = [scheduler.schedule() for scheduler in self._schedulers]
        return [step for step in steps if step is not None]

    def apply(
        self,
        step: ScheduledStep,
        token_ids: SequenceOf[int] | npt.NDArray[np.integer],
        counts: SequenceOf[int] | None = None,
        num_drafts: SequenceOf[int] | None = None,
    ) -> list[Update]:
        """As ``Scheduler.apply``: the steps of one replica come back in their order."""
        return self._schedulers[step.replica].apply(step, token_ids, counts, num_drafts)

    def statistics(self) -> SchedulerStatistics:
        """Return the sums over the replicas; a restart is one of all."""
        first, *others = [scheduler.statistics() for scheduler in self._schedulers]
        if not others:
            return first
        every = [asdict(first), *map(asdict, others)]
        sums = {name: sum(one[name] for one in every) for name in every[0] if name != "speculation"}
        return SchedulerStatistics(**{**sums, "num_restarts": first.num_restarts})

    def replica_statistics(self) -> list[SchedulerStatistics]:
        """Return the counters of each replica."""
        return [scheduler.statistics() for scheduler in self._schedulers]

    def validate(self) -> None:
        """Check the invariants of every scheduler; raises InternalError."""
        for scheduler in self._schedulers:
            scheduler.validate()

    def _choose(self, sequence: Sequence) -> Scheduler:
        if len(self._schedulers) == 1:
            return self._schedulers[0]
        return min(self._schedulers, key=lambda scheduler: scheduler.load() - scheduler.num_cached_tokens(sequence))
