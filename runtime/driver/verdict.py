"""From what is seen of failing ranks, and of what connects them, to the one error that a group ends with."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable

from ...errors import AnswerLostError, BackpressureError, PeerLostError, ProtocolError, StepGapError, WorkerError, ZspmdError
from ...transport.records import Failure
from .alarm import Alarm
from .faults import CAUSE_S, SETTLE_S, FaultLog


class Verdict:
    """Waits a moment after the first sign of a failure, then names the first cause to ``on_fault``, once.

    From ``stopping`` on the ranks are to end, and nothing is named: ``last_words`` has what went wrong meanwhile.

    Args:
        launch_id: for what can only be printed.
        faults: sorts what is seen of the ranks.
        not_ended: returns the error of a rank that had to be ended by signals.
        on_fault: gets the first cause, on the loop.

    Attributes:
        fault: the first cause, or None; once the group is closed also what its ``last_words`` were.
    """

    def __init__(
        self, launch_id: str, faults: FaultLog, not_ended: Callable[[int], WorkerError], on_fault: Callable[[ZspmdError], None]
    ) -> None:
        self._launch_id = launch_id
        self._faults = faults
        self._not_ended = not_ended
        self._on_fault = on_fault
        self.fault: ZspmdError | None = None
        self._is_stopping = False
        self._signals_from = 0.0
        self._lost: PeerLostError | None = None
        self._heard = asyncio.Event()

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind to the loop that everything is called on."""
        self._loop = loop

    def stopping(self, *, signals_after_s: float = 0.0) -> None:
        """Name no cause from now on: ranks are being ended, by signals ``signals_after_s`` from now at the earliest."""
        self._is_stopping = True
        self._signals_from = time.monotonic() + signals_after_s

    async def last_words(self) -> ZspmdError | None:
        """Return what went wrong while the ranks were being ended, or None.

        A rank's own word and its end come by different ways: where the word is missing, it has ``CAUSE_S`` to come.
        """
        with contextlib.suppress(asyncio.TimeoutError):  # it had no word, and its exit code is all there is
            await asyncio.wait_for(self._wait_words(), CAUSE_S)
        return self._faults.first_cause() if self._faults else self._lost

    def raised(self, rank: int, failure: Failure) -> None:
        """Note that a rank's code raised."""
        self._faults.raised(rank, failure)
        self._heard.set()
        self._settle()

    def exited(self, rank: int, exit_code: int, at_s: float | None = None) -> None:
        """Note that a rank's process ended, at ``at_s`` on this machine's monotonic clock; ``exit_code`` as in subprocess."""
        if self._is_stopping and exit_code in (-signal.SIGTERM, -signal.SIGKILL) and time.monotonic() >= self._signals_from:
            self._faults.failed(self._not_ended(rank))
        elif not self._is_stopping or exit_code != 0:
            self._faults.exited(rank, exit_code, at_s)
            self._settle()

    def misanswered(self, rank: int, seq: int, error: ZspmdError) -> None:
        """Fail with an answer that cannot be taken: what its rank has done is not known any more."""
        if isinstance(error, (AnswerLostError, StepGapError, BackpressureError)):  # what is missing will never be there
            self.fail(error)
        else:
            self._fail_from(error, f"rank {rank} answered frame {seq} with what it must not: {error}")

    def unreadable(self, error: Exception) -> None:
        """Fail with an answer that cannot be read: its acknowledgement is lost with it, so nothing that follows can be trusted."""
        self._fail_from(error, f"a rank's answer could not be read: {error}")

    def answer_lost(self, rank: int, seq: int) -> None:
        """Fail with an answer that a rank says it has sent."""
        self.fail(AnswerLostError(f"its answer to frame {seq} was lost on the way: it was sent and never came", rank=rank, seq=seq))

    def troubled(self, error: Exception) -> None:
        """Note that a socket or the agent failed in a way that is no rank's doing, or that a peer broke the protocol."""
        if not isinstance(error, PeerLostError):
            print(f"zspmd: {self._launch_id}: {type(error).__name__}: {error}", file=sys.stderr)
        elif self._is_stopping:
            self._lost = error
        else:
            self.fail(error)

    def fail(self, error: ZspmdError) -> None:
        """Name ``error`` as the first cause, unless there is one."""
        if self.fault is None and not self._is_stopping:
            self.fault = error
            self._on_fault(error)

    def _fail_from(self, cause: Exception, message: str) -> None:
        error = ProtocolError(message)
        error.__cause__ = cause
        self.fail(error)

    async def _wait_words(self) -> None:
        while self._faults.awaits_words:
            self._heard.clear()
            await self._heard.wait()

    def _settle(self) -> None:
        """Collect what else is heard for a moment, then name the first cause."""
        if self.fault is None and not self._is_stopping:
            Alarm(self._loop, SETTLE_S, self._conclude)

    def _conclude(self) -> None:
        if self._faults.has_cause:
            self.fail(self._faults.first_cause())
        else:
            Alarm(self._loop, CAUSE_S, lambda: self.fail(self._faults.first_cause()))
