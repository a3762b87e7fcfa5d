"""What becomes of a step or call whose deadline has passed: where every rank is, then the error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from ...errors import WorkerStalledError
from .pending import PendingReply
from .reports import RankReports

OVERDUE_STACKS_S = 0.5  # spent on finding out where the ranks are, once a step is overdue


class OverdueReplies:
    """Asks for the stacks of all ranks, once for all who need them at a time, and ends the awaits that are overdue.

    Args:
        dump_stacks: returns by rank what its process is doing, within the seconds that it is given.
        reports: says who is to blame.
        give_up: ends an await with its error.
    """

    def __init__(
        self,
        dump_stacks: Callable[[float], Awaitable[dict[int, str]]],
        reports: RankReports,
        give_up: Callable[[PendingReply, WorkerStalledError], None],
    ) -> None:
        self._dump_stacks = dump_stacks
        self._reports = reports
        self._give_up = give_up
        self._dumping: asyncio.Future[dict[int, str]] | None = None
        self._telling: set[asyncio.Task[None]] = set()

    async def dump_stacks(self, timeout_s: float) -> dict[int, str]:
        """Return by rank what each process is doing; whoever asks meanwhile gets the same."""
        return await asyncio.shield(self._dump(timeout_s))

    def add(self, pending: PendingReply, missing: Sequence[int]) -> None:
        """Take a reply that is overdue, which ``missing`` ranks have not done."""
        waited_s = time.monotonic() - pending.published_ns / 1e9
        task = asyncio.ensure_future(self._tell(pending, missing, waited_s))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def aclose(self) -> None:
        """Wait for what has been asked for, which has its deadline."""
        await asyncio.gather(*self._telling, *([] if self._dumping is None else [self._dumping]))

    def _dump(self, timeout_s: float) -> asyncio.Future[dict[int, str]]:
        if self._dumping is None or self._dumping.done():
            self._dumping = asyncio.ensure_future(self._dump_stacks(timeout_s))
        return self._dumping

    async def _tell(self, pending: PendingReply, missing: Sequence[int], waited_s: float) -> None:
        dumping = self._dump(OVERDUE_STACKS_S)
        await asyncio.wait([dumping], timeout=OVERDUE_STACKS_S)  # whoever asked first may have allowed more
        stacks = dumping.result() if dumping.done() else dict.fromkeys(missing, f"nothing was heard within {OVERDUE_STACKS_S:g} s")
        if not pending.is_done:  # by an answer that came meanwhile
            self._give_up(pending, self._reports.overdue(pending, missing, waited_s, stacks))
