"""The ticker, on a loop whose clock the test moves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from zspmd.errors import BackpressureError
from zspmd.runtime.driver.ticker import FIRST_TICK_S, LAST_TICK_S, Ticker
from zspmd.transport.window import CreditWindow


class Clock:
    """What the ticker needs of a loop: timers, which ``advance`` lets fire."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        timer = (self.now + delay, callback)
        self.timers.append(timer)

        class Handle:
            def cancel(_: Any) -> None:
                if timer in self.timers:
                    self.timers.remove(timer)

        return Handle()

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self.timers and min(self.timers)[0] <= end:
            due = min(self.timers, key=lambda timer: timer[0])
            self.timers.remove(due)
            self.now = due[0]
            due[1]()
        self.now = end


class Rig:
    def __init__(self) -> None:
        self.clock = Clock()
        self.window = CreditWindow(size=4, num_ranks=1)
        self.ticks: list[float] = []
        self.ticker = Ticker(cast(asyncio.AbstractEventLoop, self.clock), self.window, lambda: self.ticks.append(self.clock.now))
        self.seq = 0

    def publish(self) -> None:
        self.window.opened(self.seq)
        self.seq += 1
        self.ticker.arm()


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_steps_that_follow_each_other_need_no_tick(rig: Rig) -> None:
    rig.publish()
    for seq in range(100):
        rig.publish()
        rig.clock.advance(FIRST_TICK_S / 2)
        rig.window.acknowledged(0, seq)
    assert rig.ticks == []
    assert len(rig.clock.timers) == 1


def test_a_frame_after_a_long_silence_is_watched_as_closely_as_the_first(rig: Rig) -> None:
    rig.publish()
    rig.clock.advance(100 * FIRST_TICK_S)
    rig.ticks.clear()
    rig.publish()
    published = rig.clock.now
    rig.clock.advance(3 * FIRST_TICK_S)
    assert rig.ticks == [published + FIRST_TICK_S, published + 3 * FIRST_TICK_S]


def test_an_idle_group_has_no_timer(rig: Rig) -> None:
    rig.publish()
    rig.window.acknowledged(0, 0)
    rig.clock.advance(10 * FIRST_TICK_S)
    assert (rig.ticks, rig.clock.timers) == ([], [])
    rig.publish()
    assert len(rig.clock.timers) == 1


def test_a_step_that_takes_long_is_ticked_less_and_less_often(rig: Rig) -> None:
    rig.publish()
    rig.clock.advance(2.0)
    assert rig.ticks == [0.25, 0.75, 1.75]
    rig.clock.advance(3600)
    assert len(rig.ticks) < 3600 / LAST_TICK_S + 15
    distances = [after - before for before, after in zip(rig.ticks, rig.ticks[1:])]
    assert distances == sorted(distances)
    assert distances[-1] == LAST_TICK_S
    del rig.ticks[:]
    rig.window.acknowledged(0, 0)
    rig.ticker.moved()
    rig.publish()
    rig.clock.advance(2 * FIRST_TICK_S)
    assert len(rig.ticks) == 1


def test_a_rank_that_does_not_read_is_no_error_here(rig: Rig) -> None:
    def full() -> None:
        raise BackpressureError("full")

    rig.ticker._tick = full
    rig.publish()
    rig.clock.advance(2.0)
    assert len(rig.clock.timers) == 1


def test_closing_removes_the_timer(rig: Rig) -> None:
    rig.publish()
    rig.ticker.close()
    rig.ticker.close()
    assert rig.clock.timers == []
