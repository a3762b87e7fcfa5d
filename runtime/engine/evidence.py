"""Whether a fault may be a request's doing: it came from inside a rank, or from outside.

A process cannot be asked why it was killed. What its own code does to it (an exception, an exit, a signal that the processor's
faults and ``abort`` raise) is evidence against what it was computing. SIGKILL and SIGTERM come from people, and from the kernel
when memory runs out, which cannot be told apart; neither they nor the loss of an agent, a node or a connection are held against anybody.
"""

from __future__ import annotations

import signal

from ...errors import WorkerExitedError, WorkerRaisedError, WorkerStalledError, ZspmdError
from ...process import CONNECTION_LOST
from ..driver.faults import is_peer_loss
from ..driver.group import WorkerGroup

SIGNALS_FROM_INSIDE = frozenset(
    (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS, signal.SIGXFSZ)
)
_LATE_BEATS = 3


def is_from_inside(error: ZspmdError, group: WorkerGroup) -> bool:
    """Say whether a fault of a group, just now, is evidence against the requests that it was computing.

    A rank that is late but beats is stuck in its step; one that is silent may have been stopped from outside.
    """
    if isinstance(error, WorkerRaisedError):
        return not is_peer_loss(str(error.args[0]))
    if isinstance(error, WorkerExitedError):
        if error.exit_code == CONNECTION_LOST:
            return False
        return error.exit_code >= 0 or -error.exit_code in SIGNALS_FROM_INSIDE
    if isinstance(error, WorkerStalledError):
        ages = [rank.beat_age_s for rank in group.health() if rank.rank in error.missing]
        return bool(ages) and all(age is not None and age < _LATE_BEATS * group.config.deadlines.beat_s for age in ages)
    return False
