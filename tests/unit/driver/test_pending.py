"""An answer on its way: counted down by ranks, awaited once."""

from __future__ import annotations

import asyncio
import weakref

import numpy as np
import pytest

from zspmd.errors import ClosedError, ResultTakenError
from zspmd.runtime.driver.pending import PendingReply


def make(ranks: tuple[int, ...] = (2, 0)) -> PendingReply:
    loop = asyncio.get_running_loop()
    return PendingReply(loop, 5, 1, ranks, awaited=ranks, asked_ns=0, published_ns=0, limit_s=10.0)


async def started(pending: PendingReply) -> asyncio.Task[list[object]]:
    """Return a task that is inside its await."""

    async def wait() -> list[object]:
        return await pending

    task = asyncio.ensure_future(wait())
    await asyncio.wait([task], timeout=0)
    assert not task.done()
    return task


async def test_answers_come_in_the_order_of_the_ranks_asked() -> None:
    pending = make()
    task = await started(pending)
    assert not pending.answer(0, "zero")
    assert (pending.missing, pending.is_done) == ([2], False)
    assert pending.answer(2, "two")
    assert (pending.missing, pending.is_done) == ([], True)
    assert await task == ["two", "zero"]


async def test_the_first_await_takes_the_answers_and_every_other_is_an_error() -> None:
    pending = make((0,))
    tasks = [await started(pending) for _ in range(3)]
    pending.answer(0, 7)
    first, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert first == [7]
    for error in (*others, (await asyncio.gather(pending, return_exceptions=True))[0]):
        assert isinstance(error, ResultTakenError)
        assert str(error) == "the answers to step 1 were awaited before; await once and keep the list"


async def test_the_answers_are_not_kept_once_they_are_taken() -> None:
    pending = make((0,))
    pending.answer(0, answer := np.zeros(1))
    alive = weakref.ref(answer)
    del answer
    assert (await pending)[0].size == 1
    assert alive() is None
    assert pending.missing == []


async def test_a_cancelled_await_loses_nothing() -> None:
    pending = make((0,))
    task = await started(pending)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    other = await started(pending)
    pending.answer(0, 7)
    assert await other == [7]


async def test_an_error_reaches_every_await_and_is_noted() -> None:
    pending = make()
    tasks = [await started(pending) for _ in range(2)]
    assert not pending.has_raised
    pending.fail(ClosedError("closed"))
    assert await asyncio.gather(*tasks, return_exceptions=True) == [pending._error] * 2
    with pytest.raises(ClosedError):
        await pending
    assert pending.has_raised


async def test_an_error_that_nobody_awaits_is_no_complaint_of_asyncio() -> None:
    pending = make()
    pending.fail(ClosedError("closed"))
    assert not pending.has_raised
    del pending


async def test_what_comes_after_the_end_is_dropped() -> None:
    pending = make((0,))
    pending.answer(0, 7)
    assert not pending.answer(0, 8)
    pending.fail(ClosedError("closed"))
    assert await pending == [7]

    pending = make((0,))
    pending.fail(ClosedError("first"))
    pending.fail(ClosedError("second"))
    assert not pending.answer(0, 7)
    with pytest.raises(ClosedError, match="first"):
        await pending


async def test_wait_done_never_raises() -> None:
    pending = make((0,))
    waiting = pending.wait_done()
    assert not waiting.done()
    pending.fail(ClosedError("closed"))
    await waiting
    await pending.wait_done()
    assert not pending.has_raised


@pytest.mark.parametrize("is_late", [False, True], ids=["before the end", "after the end"])
async def test_callbacks_run_once_at_the_end(is_late: bool) -> None:
    calls: list[bool] = []
    pending = make((0,))
    if not is_late:
        pending.add_done_callback(lambda: calls.append(pending.is_done))
        assert calls == []
    pending.answer(0, 7)
    pending.fail(ClosedError("closed"))
    if is_late:
        pending.add_done_callback(lambda: calls.append(pending.is_done))
    assert calls == [True]
