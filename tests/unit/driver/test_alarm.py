"""A timer that a pause of its own process does not ring."""

# ruff: noqa: ASYNC251  # a loop that is held up is what these tests are about
from __future__ import annotations

import asyncio
import time

from support.polling import wait_until

from zspmd.runtime.driver.alarm import PAUSE_S, Alarm


async def test_it_rings_once() -> None:
    rung: list[int] = []
    Alarm(asyncio.get_running_loop(), 0.01, lambda: rung.append(1))
    await wait_until(lambda: bool(rung))
    await asyncio.sleep(0.03)
    assert rung == [1]


async def test_it_never_rings_once_cancelled() -> None:
    rung: list[int] = []
    alarm = Alarm(asyncio.get_running_loop(), 0.01, lambda: rung.append(1))
    alarm.cancel()
    alarm.cancel()
    await asyncio.sleep(0.03)
    assert rung == []


async def test_what_came_during_a_pause_is_seen_before_it_rings() -> None:
    """An answer that is due before the alarm, and can be read only after the pause, comes first."""
    order: list[str] = []
    loop = asyncio.get_running_loop()
    Alarm(loop, 0.1, lambda: order.append("alarm"))
    time.sleep(0.1 + 2 * PAUSE_S)
    loop.call_soon(loop.call_soon, order.append, "answer")  # in the round after the one that finds the timer late
    await wait_until(lambda: "alarm" in order)
    assert order == ["answer", "alarm"]


async def test_a_pause_that_ends_before_it_is_due_does_not_bring_it_nearer() -> None:
    rung: list[int] = []
    loop = asyncio.get_running_loop()
    Alarm(loop, 0.4, lambda: rung.append(1))
    time.sleep(0.399)
    await asyncio.sleep(0.1)
    assert rung == []
    await wait_until(lambda: bool(rung))


async def test_it_rings_on_a_loop_that_is_always_late() -> None:
    rung: list[int] = []
    Alarm(asyncio.get_running_loop(), 0.008, lambda: rung.append(1))
    for _ in range(60):  # more than twice the slices
        time.sleep(0.003)
        await asyncio.sleep(0)
    assert rung == [1]


async def test_a_cancelled_alarm_stays_so_after_a_pause() -> None:
    rung: list[int] = []
    alarm = Alarm(asyncio.get_running_loop(), 0.1, lambda: rung.append(1))
    time.sleep(0.1 + 2 * PAUSE_S)
    await asyncio.sleep(0)  # it has found itself late and waits again
    alarm.cancel()
    await asyncio.sleep(0.2)
    assert rung == []
