"""Which failure came first: sorts what was seen of each rank into one fault and its consequences. No I/O.

When a rank dies, its peers fail too, in their collectives, and may be heard of first. So what is seen is collected for
``SETTLE_S`` and then ranked: a process that ended by itself, then an exception of a rank's own, then a rank that the driver had to end,
then an exit with code 1, which follows an exception that has yet to be heard of, then an exception that a lost peer explains. Within a
class the earliest wins: an exit counts from when its agent saw it, whatever the way of the news, an exception from when it was heard of.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...errors import WorkerError, WorkerExitedError, WorkerRaisedError, describe_exit
from ...transport.records import Failure

SETTLE_S = 0.05
CAUSE_S = 0.5  # longer, while all that was seen follows from the end of a rank of which the agent has yet to tell
RAISED_EXIT_CODE = 1  # of a rank that has told the driver why
_PEER_LOST = 4

_PEER_LOSS = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|remote process|socket closed|peer is (gone|late)"
    r"|NCCL.*remote error|gloo.*(timed out|closed)",
    re.IGNORECASE | re.DOTALL,
)


def is_peer_loss(text: str) -> bool:
    """Say whether the text of an error is explained by the end of another rank."""
    return _PEER_LOSS.search(text) is not None


@dataclass(frozen=True)
class RankIdentity:
    """Where a rank runs, as far as is known."""

    host: str = "localhost"
    pid: int | None = None
    step_id: int | None = None


@dataclass
class _Seen:
    """What is known of one rank's failure; ``at_s`` is when it was first seen, on this machine's monotonic clock."""

    at_s: float
    failure: Failure | None = None
    exit_code: int | None = None
    error: WorkerError | None = None


@dataclass
class FaultLog:
    """Collects failures by rank and names the first cause.

    Args:
        identity: tells where a rank runs.
        log_tail: returns the last lines that a rank printed.
    """

    identity: Callable[[int], RankIdentity]
    log_tail: Callable[[int], list[str]]
    _seen: dict[int, _Seen] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._seen)

    def raised(self, rank: int, failure: Failure) -> None:
        """Note that a rank's code raised."""
        seen = self._of(rank)
        if seen.failure is None:
            seen.failure = failure

    def exited(self, rank: int, exit_code: int, at_s: float | None = None) -> None:
        """Note that a rank's process ended, at ``at_s`` or just now; ``exit_code`` as in subprocess."""
        seen = self._of(rank)
        seen.exit_code = exit_code
        if at_s is not None:
            seen.at_s = min(seen.at_s, at_s)

    def failed(self, error: WorkerError) -> None:
        """Note a failure that the driver itself found."""
        seen = self._of(error.rank)
        if seen.error is None:
            seen.error = error

    @property
    def has_cause(self) -> bool:
        """Whether something was seen that is not explained by the end of another rank."""
        return any(_severity(seen) < _PEER_LOST for seen in self._seen.values())

    @property
    def awaits_words(self) -> bool:
        """Whether a rank has ended as one does that has told the driver why, and that has not been heard yet."""
        return any(seen.failure is None and seen.exit_code == RAISED_EXIT_CODE for seen in self._seen.values())

    def first_cause(self) -> WorkerError:
        """Return the error of the rank that failed first, with the others' as its consequences."""
        ordered = sorted(self._seen.items(), key=lambda item: (_severity(item[1]), item[1].at_s))
        (rank, seen), *others = ordered
        consequences = [f"rank {other}: {_one_line(what)}" for other, what in others]
        return self._error(rank, seen, consequences)

    def _of(self, rank: int) -> _Seen:
        return self._seen.setdefault(rank, _Seen(time.monotonic()))

    def _error(self, rank: int, seen: _Seen, consequences: list[str]) -> WorkerError:
        if seen.error is not None:
            seen.error.consequences = (*seen.error.consequences, *consequences)
            return seen.error
        where = self.identity(rank)
        facts: dict[str, Any] = {
            "rank": rank,
            "host": where.host,
            "pid": where.pid,
            "log_tail": self.log_tail(rank),
            "consequences": consequences,
        }
        if seen.failure is not None:
            failure = seen.failure
            return WorkerRaisedError(
                f"raised {failure.exception_type} in its {failure.phase}: {failure.message}",
                remote_traceback=failure.traceback,
                exception_type=failure.exception_type,
                step_id=failure.step_id if failure.step_id >= 0 else None,
                **facts,
            )
        assert seen.exit_code is not None
        return WorkerExitedError(exit_code=seen.exit_code, step_id=where.step_id, **facts)


def _severity(seen: _Seen) -> int:
    if seen.error is not None:
        return 2
    if seen.failure is None:
        return 3 if seen.exit_code == RAISED_EXIT_CODE else 0
    return _PEER_LOST if is_peer_loss(seen.failure.message) else 1


def _one_line(seen: _Seen) -> str:
    if seen.failure is not None:
        message = seen.failure.message.strip().splitlines() or [""]
        return f"raised {seen.failure.exception_type}: {message[0][:200]}"
    if seen.error is not None:
        return str(seen.error.args[0])
    assert seen.exit_code is not None
    return describe_exit(seen.exit_code)
