"""How many restarts are left: a pure count of faults over time, as Erlang's supervisors keep it."""

from __future__ import annotations

from dataclasses import dataclass

from ...config import RestartPolicy
from ...errors import ZspmdError


@dataclass(eq=False)
class CountedFault:
    """A fault that counts; one that a failed request explains does so until a step has come back without that request."""

    error: ZspmdError
    at: float
    is_explained: bool = False


class RestartBudget:
    """Counts faults against a ``RestartPolicy``.

    A fault is forgotten ``window_s`` later, if new workers have become ready since the last one. Without that condition a start that
    takes longer than the window could fail for ever.
    """

    def __init__(self, policy: RestartPolicy) -> None:
        self.policy = policy
        self._faults: list[CountedFault] = []
        self._is_ready = True
        self._has_explained = False

    @property
    def num_counted(self) -> int:
        return len(self._faults)

    def charge(self, error: ZspmdError, now: float) -> CountedFault | None:
        """Count a fault; None if it is one too many, and then the faults before it are its chain of causes.

        Args:
            error: what happened.
            now: seconds on a monotonic clock.
        """
        if self._is_ready:
            self._faults = [fault for fault in self._faults if fault.at > now - self.policy.window_s]
            self._is_ready = False
        fault = CountedFault(error, now)
        self._faults.append(fault)
        if len(self._faults) <= self.policy.max_restarts:
            return fault
        for earlier, later in zip(self._faults, self._faults[1:]):
            _chain(later.error, earlier.error)
        return None

    def restarted(self) -> None:
        """Note that new workers are ready."""
        self._is_ready = True

    def explain(self, fault: CountedFault) -> None:
        """Note that a request was to blame; if so, steps will come back now."""
        fault.is_explained = self._has_explained = True

    def progressed(self) -> None:
        """Note that a step has come back."""
        if self._has_explained:
            self._has_explained = False
            self._faults = [fault for fault in self._faults if not fault.is_explained]


def _chain(error: BaseException, earlier: BaseException) -> None:
    """Hang ``earlier`` below the last cause of ``error``."""
    while error.__cause__ is not None and error is not earlier:
        error = error.__cause__
    if error is not earlier:
        error.__cause__ = earlier
