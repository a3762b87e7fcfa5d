"""A flag that one task waits for."""

from __future__ import annotations

import asyncio


class Wakeup:
    """Set by whoever has news, waited for and cleared by one task: an ``asyncio.Event`` for one, at half the cost.

    News that come while nobody waits are not lost: the next wait ends at once. Belongs to the loop of the task that waits.
    """

    __slots__ = ("_is_set", "_waiter")

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Have the wait end, or the next one; may be called again before that."""
        self._is_set = True
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def wait(self) -> None:
        """Wait until it is set, and clear it.

        Cancellation: it stays set, if it was.
        """
        if not self._is_set:
            assert self._waiter is None, "another task waits"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._is_set = False
