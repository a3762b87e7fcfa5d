"""The deadlines of steps and calls: one timer for all, which a pause of the process does not ring."""

# ruff: noqa: ASYNC251  # a loop that is held up is what these tests are about
from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from support.polling import wait_until

from zspmd.runtime.driver.alarm import PAUSE_S
from zspmd.runtime.driver.pending import PendingReply
from zspmd.runtime.driver.reply_deadlines import ReplyDeadlines


class Replies:
    """Replies that are asked for, and those found overdue, by their numbers."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.pending: dict[int, PendingReply] = {}
        self.overdue: list[int] = []
        self.deadlines = ReplyDeadlines(self.loop, self.pending, lambda reply: self.overdue.append(reply.seq))

    def ask(self, limit_s: float) -> int:
        """Ask for one more, and return its number."""
        seq, now_ns = len(self.pending), time.monotonic_ns()
        reply = PendingReply(self.loop, seq, seq, (0,), awaited=(0,), asked_ns=now_ns, published_ns=now_ns, limit_s=limit_s)
        self.pending[seq] = reply
        self.deadlines.watch(reply)
        return seq


@pytest.fixture
async def replies() -> Replies:
    return Replies()


@pytest.fixture(autouse=True)
def closed(replies: Replies) -> Iterator[None]:
    yield
    replies.deadlines.close()


async def test_what_is_not_answered_in_time_is_overdue_once(replies: Replies) -> None:
    began = time.monotonic()
    replies.ask(0.05)
    await wait_until(lambda: bool(replies.overdue))
    assert time.monotonic() - began >= 0.045
    await asyncio.sleep(0.1)
    assert replies.overdue == [0]


async def test_what_is_answered_in_time_is_not(replies: Replies) -> None:
    seq = replies.ask(0.02)
    del replies.pending[seq]
    await asyncio.sleep(0.06)
    assert replies.overdue == []


async def test_a_short_limit_is_kept_beside_a_long_one(replies: Replies) -> None:
    replies.ask(100.0)
    replies.ask(0.02)
    replies.ask(50.0)
    await wait_until(lambda: bool(replies.overdue))
    assert replies.overdue == [1]


async def test_a_limit_holds_that_began_while_the_timer_ran_for_another(replies: Replies) -> None:
    """The timer has not seen it when it rings, or rings for it alone."""
    began = time.monotonic()
    first = replies.ask(0.08)
    await asyncio.sleep(0.03)
    replies.ask(0.08)
    del replies.pending[first]
    await wait_until(lambda: bool(replies.overdue))
    assert replies.overdue == [1]
    assert time.monotonic() - began >= 0.1


async def test_steps_that_follow_each_other_leave_the_timer_alone(replies: Replies, monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[float] = []
    monkeypatch.setattr(replies.loop, "call_at", lambda when, callback: timers.append(when))
    for _ in range(100):
        replies.ask(10.0)
    assert len(timers) == 1


async def test_what_came_during_a_pause_is_seen_before_it_is_overdue(replies: Replies) -> None:
    seq = replies.ask(0.1)
    time.sleep(0.1 + 2 * PAUSE_S)
    replies.loop.call_soon(replies.loop.call_soon, replies.pending.pop, seq)  # in the round after the one that finds the timer late
    await asyncio.sleep(0.3)
    assert replies.overdue == []


async def test_a_pause_that_ends_before_it_is_due_does_not_bring_it_nearer(replies: Replies) -> None:
    replies.ask(0.4)
    time.sleep(0.399)
    await asyncio.sleep(0.1)
    assert replies.overdue == []
    await wait_until(lambda: bool(replies.overdue))


async def test_nothing_is_overdue_once_it_is_closed(replies: Replies) -> None:
    replies.ask(0.01)
    replies.deadlines.close()
    replies.deadlines.close()
    await asyncio.sleep(0.05)
    assert replies.overdue == []
