"""What becomes of an engine's requests when its workers fail: who is restarted for, held back, failed. No I/O and no clock.

    fault --> the scheduler forgets its steps; unfinished sequences keep their tokens and wait
      |-- from outside, or no step in flight ----> counted; restart, or escalate beyond the policy
      |-- from inside, in the open --------------> counted as well; the requests of these steps are suspects (``Isolation``)
      '-- from inside, while a suspect is alone -> not counted; restart; the second time the request fails

Restarts during trials are at most two for each suspect, so they need not be counted; if they were, one bad request would use up the
policy of all. For the same reason the fault that began an isolation counts no longer when the request that explains it has failed,
but only once a step has come back: where every step fails, it is not the requests. So each further verdict of an isolation counts
as well, until a step has come back.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from ...config import RestartPolicy
from ...errors import InternalError, ZspmdError
from .isolation import Isolation, Suspect, suspects_of
from .plan import ScheduledStep
from .replicas import Replicas
from .restart_budget import CountedFault, RestartBudget


class Ruling(NamedTuple):
    """What to do after a fault.

    Attributes:
        may_restart: False ends the engine with the fault.
        poison: the request to fail alone, by name.
        num_suspects: requests that will be tried apart, where that begins with this fault.
    """

    may_restart: bool
    poison: str | None = None
    num_suspects: int = 0

    def describe(self, error: ZspmdError, policy: RestartPolicy, *, num_requests: int) -> str:
        """Return a line that names the cause and what follows from it."""
        cause = str(error).partition("\n")[0]
        limit = f"{policy.max_restarts} restarts within {policy.window_s:g} s"
        if not self.may_restart:
            return f"{cause}; not restarted, since {limit} are the limit"
        line = f"{cause}; restarting the workers, {num_requests} requests go on"
        if self.poison is not None:
            line += f", but {self.poison} fails: it ended its workers twice while it ran alone"
        if self.num_suspects:
            line += f"; {self.num_suspects} were being computed and are tried one at a time"
        return line


class Recovery:
    """Decides after each fault, and lets the scheduler run whom it may.

    Args:
        policy: how many faults are outlived.
        scheduler: of the engine's replicas; it is reset for each restart.
    """

    def __init__(self, policy: RestartPolicy, scheduler: Replicas) -> None:
        self.budget = RestartBudget(policy)
        self._scheduler = scheduler
        self._isolation: Isolation | None = None
        self._opened_by: CountedFault | None = None
        self._admitted: frozenset[str] | None = None

    def faulted(self, error: ZspmdError, steps: Collection[ScheduledStep], *, is_from_inside: bool, now: float) -> Ruling:
        """Rule on a fault; if there will be new ranks, every unfinished sequence waits for them.

        Args:
            error: the group's first cause, or why its replacement did not start.
            steps: those in flight.
            is_from_inside: whether it may be the doing of what was computed.
            now: seconds on a monotonic clock.
        """
        ruling = self._rule(error, suspects_of(steps) if is_from_inside else [], now)
        if ruling.may_restart:
            self._scheduler.reset()
            self._admit()
        return ruling

    def restarted(self) -> None:
        """Note that new ranks are ready."""
        self.budget.restarted()

    def progressed(self) -> None:
        """Note that a step has come back."""
        self.budget.progressed()

    def advance(self, *, is_drained: bool) -> None:
        """Go on with an isolation; ``is_drained`` says that no step is in flight."""
        if self._isolation is not None:
            if self._isolation.advance(is_drained=is_drained):
                self._isolation = None
            self._admit()

    def validate(self) -> None:
        """Check that requests are held back exactly while suspects are tried apart; raises InternalError."""
        if (self._isolation is None) != (self._admitted is None):
            state = "no suspect is tried" if self._isolation is None else "suspects are tried apart"
            raise InternalError(f"{state}, but the scheduler admits {self._admitted}")

    def _rule(self, error: ZspmdError, suspects: list[Suspect], now: float) -> Ruling:
        if self._isolation is not None and suspects:
            poison = self._isolation.strike(suspects)
            if poison is None:
                return Ruling(True)
            explained, self._opened_by = self._opened_by or self.budget.charge(error, now), None
            if explained is None:
                return Ruling(False)
            self.budget.explain(explained)
            return Ruling(True, poison.request_id)
        fault = self.budget.charge(error, now)
        if fault is None:
            return Ruling(False)
        if not suspects:
            return Ruling(True)
        self._isolation, self._opened_by = Isolation(suspects), fault
        return Ruling(True, num_suspects=len(suspects))

    def _admit(self) -> None:
        admitted = None if self._isolation is None else self._isolation.admitted
        if admitted != self._admitted:
            self._scheduler.run_only(admitted)
            self._admitted = admitted
