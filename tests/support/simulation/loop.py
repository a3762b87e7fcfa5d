"""An asyncio event loop over virtual time: it never waits, and does the same for the same seed."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

from .world import World

MAX_TURNS = 200_000
LONGEST_TURN_S = 20e-6  # what the driver's own work takes: time moves even while it is busy

ResultT = TypeVar("ResultT")


class SimulatedHandle:
    """A callback that is due, at ``when`` or as soon as can be; as much of ``asyncio.TimerHandle`` as is used."""

    __slots__ = ("_when", "args", "callback", "is_cancelled")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...], when: float = 0.0) -> None:
        self.callback = callback
        self.args = args
        self.is_cancelled = False
        self._when = when

    def cancel(self) -> None:
        self.is_cancelled = True

    def cancelled(self) -> bool:
        return self.is_cancelled

    def when(self) -> float:
        return self._when


class SimulatedLoop:
    """Runs callbacks, timers and readers as asyncio does: what can be read first, then the timers that are due, then both in turn.

    It has as much of ``asyncio.AbstractEventLoop`` as the driver and asyncio's own futures and tasks use. Readers are called while
    their fd is in ``readable``; who makes it readable takes it out again.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._ready: deque[SimulatedHandle] = deque()
        self._timers: list[tuple[float, int, SimulatedHandle]] = []
        self._count = itertools.count()
        self._until = math.inf
        self._readers: dict[int, tuple[Callable[..., object], tuple[Any, ...]]] = {}
        self._as_loop: Any = self  # for asyncio, whose annotations ask for all that a loop can have
        self.readable: dict[int, None] = {}  # in order, which a set has not
        self.complaints: list[str] = []  # of callbacks that raised, and exceptions that nobody took

    def time(self) -> float:
        return self._world.now

    def get_debug(self) -> bool:
        return False

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> SimulatedHandle:
        handle = SimulatedHandle(callback, args)
        self._ready.append(handle)
        return handle

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> SimulatedHandle:
        return self.call_at(self._world.now + delay, callback, *args)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None) -> SimulatedHandle:
        handle = SimulatedHandle(callback, args, when)
        heapq.heappush(self._timers, (when, next(self._count), handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self._as_loop)

    def create_task(self, coro: Any, *, name: str | None = None, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self._as_loop, name=name)

    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        self._readers[fd] = (callback, args)

    def remove_reader(self, fd: int) -> bool:
        return self._readers.pop(fd, None) is not None

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.complaints.append(f"{context.get('message')}: {context.get('exception')!r}")

    @property
    def num_readers(self) -> int:
        return len(self._readers)

    @property
    def live_timers(self) -> list[float]:
        """When the timers are due that nobody has cancelled."""
        return [when for when, _, handle in self._timers if not handle.cancelled()]

    def run(self, main: Coroutine[Any, Any, ResultT], *, until: float) -> ResultT:
        """Run to the end of ``main`` and return its result.

        Raises:
            TimeoutError: it has not ended at ``until``, or nothing can happen any more.
        """
        self._until = until
        asyncio._set_running_loop(self._as_loop)
        try:
            task: asyncio.Task[ResultT] = self.create_task(main)
            for _ in range(MAX_TURNS):
                if task.done():
                    return task.result()
                if self._world.now > until:
                    raise TimeoutError("the run has not come to its end")
                self._turn()
            raise TimeoutError(f"the loop turns without end: {MAX_TURNS} times")
        finally:
            asyncio._set_running_loop(None)

    def _turn(self) -> None:
        world, ready, timers = self._world, self._ready, self._timers
        if not ready:
            self._sleep()
        while world.now < world.driver_paused_until:
            world.advance(world.driver_paused_until)
        for fd in self.readable:
            if fd in self._readers:
                callback, args = self._readers[fd]
                ready.append(SimulatedHandle(callback, args))
        while timers and timers[0][0] <= world.now:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.is_cancelled:
                continue
            try:
                handle.callback(*handle.args)
            except Exception as error:
                self.complaints.append(f"a callback raised {error!r}")
        turned_at = world.now + LONGEST_TURN_S * world.chance.random()
        if world.next_at <= turned_at:
            world.advance(turned_at)
        else:
            world.now = turned_at

    def _sleep(self) -> None:
        """Let time pass until a timer is due or something can be read; to the end of the run at most: a silent rank beats for ever."""
        world = self._world
        timer_at = self._timers[0][0] if self._timers else math.inf
        while world.now < min(timer_at, self._until) and not (self.readable and self._can_read()):
            next_at = world.next_at
            if next_at < timer_at:
                world.advance(next_at)
            elif timer_at < math.inf:
                world.advance(timer_at)
            else:
                raise TimeoutError("nothing can happen any more")

    def _can_read(self) -> bool:
        return not self._readers.keys().isdisjoint(self.readable)
