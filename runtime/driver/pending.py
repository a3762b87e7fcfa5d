"""An answer that is on its way: one object for a step or call, counted down by the ranks that answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import ResultTakenError

if TYPE_CHECKING:
    from .alarm import PatientDelay


class PendingReply:
    """Await it, once, for the list of the ranks' answers in the order of ``ranks``.

    The answers are the awaiter's alone from then on, so that large ones live no longer than it wants; a second await raises
    ResultTakenError. An await that is cancelled has taken nothing, and an error is raised from every await.

    Attributes:
        seq: the frame that asked.
        step_id: the step, or None for a call.
        ranks: who answers.
        awaited: whose word ends it: ``ranks``, or every rank where they read the inputs out of the caller's memory.
        asked_ns, published_ns: on the monotonic clock, before and after the inputs were encoded.
        limit_s: how long it may take; infinite once that has passed.
        delay: what is left of it, from when ``ReplyDeadlines`` has first looked.
        is_done: whether an await would return or raise at once.
        has_raised: whether an await got the error.
    """

    __slots__ = (
        "_answers",
        "_callbacks",
        "_error",
        "_is_taken",
        "_loop",
        "_num_awaited",
        "_waiters",
        "asked_ns",
        "awaited",
        "delay",
        "has_raised",
        "is_done",
        "limit_s",
        "published_ns",
        "ranks",
        "seq",
        "step_id",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        seq: int,
        step_id: int | None,
        ranks: Sequence[int],
        *,
        awaited: Sequence[int],
        asked_ns: int,
        published_ns: int,
        limit_s: float,
    ) -> None:
        self.seq = seq
        self.step_id = step_id
        self.ranks = ranks
        self.awaited = awaited
        self.asked_ns = asked_ns
        self.published_ns = published_ns
        self.limit_s = limit_s
        self.delay: PatientDelay | None = None
        self.has_raised = False
        self.is_done = False
        self._loop = loop
        self._num_awaited = len(awaited)
        self._answers: dict[int, Any] = {}
        self._error: BaseException | None = None
        self._is_taken = False
        self._waiters: list[asyncio.Future[None]] = []
        self._callbacks: list[Callable[[], None]] = []

    @property
    def missing(self) -> list[int]:
        """The awaited ranks that have not been heard of."""
        return [] if self._is_taken else [rank for rank in self.awaited if rank not in self._answers]

    def __await__(self) -> Generator[Any, None, list[Any]]:
        if not self.is_done:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._waiters.append(waiter)
            yield from waiter
        if self._error is not None:
            self.has_raised = True
            raise self._error.with_traceback(None)  # one error for many awaits: each begins its own traceback
        if self._is_taken:
            what = "a call" if self.step_id is None else f"step {self.step_id}"
            raise ResultTakenError(f"the answers to {what} were awaited before; await once and keep the list")
        self._is_taken = True
        answers, self._answers = self._answers, {}
        return [answers[rank] for rank in self.ranks]

    def wait_done(self) -> asyncio.Future[None]:
        """Return a future for the end, whichever it is; it never raises."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        if self.is_done:
            waiter.set_result(None)
        else:
            self._waiters.append(waiter)
        return waiter

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Have ``callback`` called at the end, whichever it is; at once if that has been."""
        if self.is_done:
            callback()
        else:
            self._callbacks.append(callback)

    def answer(self, rank: int, value: Any) -> bool:
        """Take one awaited rank's answer, None of one that gives none; returns whether it was the last. Those after the end are dropped."""
        if self.is_done:
            return False
        self._answers[rank] = value
        if len(self._answers) < self._num_awaited:
            return False
        self._finish()
        return True

    def fail(self, error: BaseException) -> None:
        """End with an error; the first end counts."""
        if not self.is_done:
            self._error = error
            self._finish()

    def _finish(self) -> None:
        self.is_done = True
        for waiter in self._waiters:
            if not waiter.done():  # else its await was cancelled
                waiter.set_result(None)
        self._waiters.clear()
        for callback in self._callbacks:
            callback()
        self._callbacks.clear()
