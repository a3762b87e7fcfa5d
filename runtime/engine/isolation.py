"""Finding the request that ends its workers: each of those that were being computed runs alone for a few steps.

    untried: a b c d    trial: -     a fault of the workers' own, while a to d were in flight
    untried: a b c      trial: d     d alone; the others, and whoever comes, wait
    untried: b c        trial: a     d came past the tokens that it had in flight: cleared; so does a
    untried: b          trial: c     c ends its workers, and again: poison

One at a time, not halves: an innocent costs its prefill and a few steps, and each half with the culprit in it would cost a restart.
The newest and the oldest in turn: a request that cannot be computed mostly shows it when it comes, and one that has run for long
shows that the workers are sound.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from ...errors import InternalError
from .plan import ScheduledStep
from .request import Sequence

STRIKES = 2


@dataclass
class Suspect:
    """A request that was being computed at a fault; ``goals`` are the known tokens with which each sequence has passed that point."""

    request_id: str
    goals: dict[Sequence, int]
    strikes: int = 0

    @property
    def is_cleared(self) -> bool:
        return all(sequence.is_finished or sequence.num_known >= goal for sequence, goal in self.goals.items())


def suspects_of(steps: Iterable[ScheduledStep]) -> list[Suspect]:
    """Return the unfinished requests of the steps in flight, oldest first; ask before the scheduler forgets those steps."""
    sequences = {sequence for step in steps for sequence in (*step.sampled, *step.unsampled) if not sequence.is_finished}
    suspects: dict[str, Suspect] = {}
    for sequence in sorted(sequences, key=lambda sequence: sequence.age):
        suspect = suspects.setdefault(sequence.request_id, Suspect(sequence.request_id, {}))
        suspect.goals[sequence] = max(sequence.num_tokens, sequence.num_known + 1)
    return list(suspects.values())


class Isolation:
    """Tries the suspects of one fault apart.

    Args:
        suspects: oldest first, at least one. A single one has run alone already: that is its first strike.
    """

    def __init__(self, suspects: SequenceOf[Suspect]) -> None:
        self._untried = deque(suspects)
        self._is_newest_next = True
        self._trial: Suspect | None = None
        if len(suspects) == 1:
            suspects[0].strikes = 1

    @property
    def admitted(self) -> frozenset[str]:
        """Requests that may run now; none while steps of the last trial are still in flight."""
        return frozenset() if self._trial is None or self._trial.is_cleared else frozenset([self._trial.request_id])

    def strike(self, in_flight: SequenceOf[Suspect]) -> Suspect | None:
        """Note that workers ended by themselves during a trial; returns its request if that was the second time.

        Args:
            in_flight: as ``suspects_of`` gives them at this fault; empty if the request has ended meanwhile.
        """
        trial = self._trial
        if trial is None or not in_flight:
            return None
        if [suspect.request_id for suspect in in_flight] != [trial.request_id]:
            raise InternalError(f"{trial.request_id} was to run alone, but {[suspect.request_id for suspect in in_flight]} did")
        trial.goals.update(in_flight[0].goals)
        trial.strikes += 1
        if trial.strikes < STRIKES:
            return None
        self._trial = None
        return trial

    def advance(self, *, is_drained: bool) -> bool:
        """Go on to the next suspect if this one is cleared and no step is in flight; returns whether all are cleared."""
        while is_drained and (self._trial is None or self._trial.is_cleared):
            if not self._untried:
                return True
            self._trial = self._untried.pop() if self._is_newest_next else self._untried.popleft()
            self._is_newest_next = not self._is_newest_next
        return False
