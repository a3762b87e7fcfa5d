"""Waiting for room in the window: first come first served, and no room is lost with those who give up."""

from __future__ import annotations

import asyncio

import pytest

from zspmd.errors import BackpressureError, ClosedError
from zspmd.runtime.driver.gate import WindowGate
from zspmd.transport.window import CreditWindow


class Line:
    """A gate over a window of one rank, and tasks that publish one frame each once they are let through."""

    def __init__(self, size: int) -> None:
        self.window = CreditWindow(size=size, num_ranks=1)
        self.gate = WindowGate(self.window)
        self.published: list[str] = []
        self.acknowledged = 0

    async def publish(self, name: str, timeout_s: float = 10.0) -> None:
        await self.gate.wait(timeout_s)
        assert self.window.in_flight < self.window.size
        self.window.opened(len(self.published))
        self.published.append(name)

    async def started(self, *names: str) -> list[asyncio.Task[None]]:
        """Return a task for each name, after each has run as far as it can."""
        tasks = [asyncio.ensure_future(self.publish(name)) for name in names]
        await settle()
        return tasks

    def acknowledge(self) -> None:
        assert self.window.acknowledged(0, self.acknowledged)
        self.acknowledged += 1
        self.gate.grant()


async def settle() -> None:
    """Let every task that can run do so."""
    await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0)) for _ in range(3)])


async def test_it_lets_through_while_there_is_room() -> None:
    line = Line(2)
    tasks = await line.started("a", "b", "c")
    assert (line.published, line.gate.has_waiters) == (["a", "b"], True)
    line.acknowledge()
    await asyncio.gather(*tasks)


async def test_room_is_given_in_the_order_of_asking() -> None:
    line = Line(1)
    await line.started("a", "b", "c")
    line.acknowledge()
    late = await line.started("late")
    assert line.published == ["a", "b"]
    line.acknowledge()
    await settle()
    line.acknowledge()
    await asyncio.gather(*late)
    assert line.published == ["a", "b", "c", "late"]


async def test_granted_room_is_not_given_twice() -> None:
    line = Line(1)
    await line.started("a", "b")
    line.acknowledge()  # granted to b, which has not run
    line.gate.grant()
    newcomer = asyncio.ensure_future(line.publish("c"))
    await settle()
    assert line.published == ["a", "b"]
    newcomer.cancel()
    await asyncio.wait([newcomer])


@pytest.mark.parametrize("is_granted", [False, True], ids=["before its turn", "on its turn"])
async def test_who_is_cancelled_passes_the_room_on(is_granted: bool) -> None:
    line = Line(1)
    _, quitter, heir = await line.started("a", "quitter", "heir")
    if is_granted:
        line.acknowledge()
        quitter.cancel()
    else:
        quitter.cancel()
        await settle()
        line.acknowledge()
    await heir
    assert (line.published, quitter.cancelled()) == (["a", "heir"], True)


async def test_who_waits_too_long_is_told_who_is_behind_and_the_rest_go_on() -> None:
    line = Line(1)
    _, patient = await line.started("a", "b")
    with pytest.raises(BackpressureError, match=r"no room in the window of 1 frames within 0\.01 s: rank 0 has not done the oldest"):
        await line.publish("c", timeout_s=0.01)
    line.acknowledge()
    await patient
    assert line.published == ["a", "b"]
    line.acknowledge()
    await line.publish("d")


async def test_a_fault_reaches_everybody_who_waits() -> None:
    line = Line(1)
    _, *waiting = await line.started("a", "b", "c")
    waiting[0].cancel()
    error = ClosedError("closed")
    line.gate.fail(error)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1] is error
    assert not line.gate.has_waiters
