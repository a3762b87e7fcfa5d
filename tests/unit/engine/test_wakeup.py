"""A flag that one task waits for."""

from __future__ import annotations

import asyncio

import pytest

from zspmd.runtime.engine.wakeup import Wakeup


async def test_news_that_came_before_the_wait_end_it_once() -> None:
    wakeup = Wakeup()
    wakeup.set()
    wakeup.set()
    await asyncio.wait_for(wakeup.wait(), 5)
    waiting = asyncio.create_task(wakeup.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    wakeup.set()
    wakeup.set()  # before the task has run
    await asyncio.wait_for(waiting, 5)


async def test_a_cancelled_wait_loses_nothing() -> None:
    wakeup = Wakeup()
    waiting = asyncio.create_task(wakeup.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    wakeup.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(wakeup.wait(), 5)
