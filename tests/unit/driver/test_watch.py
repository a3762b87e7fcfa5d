"""Silence and lost answers, on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest

from zspmd.runtime.driver import watch
from zspmd.runtime.driver.control import RankRecord
from zspmd.runtime.driver.watch import LOST_S, SILENT_BEATS, RankWatch
from zspmd.transport.records import Beat
from zspmd.transport.window import CreditWindow


class Watched:
    """Two ranks, a window, and a clock that stands until it is moved; ``events`` is what the watch has told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.events: list[tuple[str, int, float]] = []
        self.records = [RankRecord(0), RankRecord(1)]
        self.window = CreditWindow(size=4, num_ranks=2)
        self._look: Callable[[], None] | None = None
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.watch = RankWatch(
            lambda: self.records,
            self.window,
            beat_s=1.0,
            on_silent=lambda rank, unheard_s: self.events.append(("silent", rank, unheard_s)),
            on_heard=lambda rank: self.events.append(("heard", rank, 0.0)),
            on_lost=lambda rank, seq: self.events.append(("lost", rank, seq)),
        )
        self.watch.start(cast(asyncio.AbstractEventLoop, self))

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> SimpleNamespace:
        """Stand in for the loop: one timer, which ``tick`` rings."""
        self._look = callback
        return SimpleNamespace(cancel=lambda: None)

    def beat(self, rank: int, done_seq: int = -1) -> None:
        self.records[rank].beat = Beat(phase="idle", seq=done_seq, done_seq=done_seq, step_id=-1, memory_bytes=0)
        self.records[rank].beat_at = self.now

    def tick(self, *beating: int, seconds: int = 1, done_seq: int = -1) -> None:
        """Let seconds pass in which these ranks beat."""
        for _ in range(seconds):
            self.now += 1.0
            for rank in beating:
                self.beat(rank, done_seq)
            assert self._look is not None
            self._look()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def test_a_rank_that_beats_is_not_silent(watched: Watched) -> None:
    watched.tick(0, 1, seconds=20)
    assert watched.events == []


def test_a_silence_is_told_once_and_so_is_its_end(watched: Watched) -> None:
    watched.tick(0, 1)
    watched.tick(0, seconds=10)
    assert watched.events == [("silent", 1, SILENT_BEATS + 1)]
    watched.tick(0, 1, seconds=2)
    watched.tick(0, seconds=10)
    assert [kind for kind, *_ in watched.events] == ["silent", "heard", "silent"]


def test_a_rank_that_has_not_begun_to_beat_is_not_silent(watched: Watched) -> None:
    watched.tick(0, seconds=10)
    assert watched.events == []


def test_a_pause_of_the_driver_makes_nobody_silent(watched: Watched) -> None:
    watched.tick(0, 1, seconds=3)
    watched.now += 60.0
    watched.tick()
    watched.tick(seconds=SILENT_BEATS)
    assert watched.events == []
    watched.tick(1)
    assert [event[:2] for event in watched.events] == [("silent", 0)]


def test_an_answer_that_a_rank_has_given_and_that_never_comes_is_lost(watched: Watched) -> None:
    watched.window.opened(0)
    watched.window.acknowledged(0, 0)
    watched.tick(0, 1, done_seq=0, seconds=int(LOST_S))
    assert watched.events == []
    watched.tick(0, 1, done_seq=0)
    assert watched.events == [("lost", 1, 0)]


def test_an_answer_that_comes_after_the_beat_is_not_lost(watched: Watched) -> None:
    watched.window.opened(0)
    watched.tick(0, 1, done_seq=0, seconds=int(LOST_S))
    for rank in (0, 1):
        watched.window.acknowledged(rank, 0)
    watched.tick(0, 1, done_seq=0, seconds=20)
    assert watched.events == []


def test_answers_that_keep_coming_late_are_not_lost(watched: Watched) -> None:
    for seq in range(20):
        watched.window.opened(seq)
        watched.beat(0, seq)
        watched.beat(1, seq)
        watched.tick(seconds=2)
        for rank in (0, 1):
            watched.window.acknowledged(rank, seq)
    assert watched.events == []


def test_a_pause_of_the_driver_loses_no_answer(watched: Watched) -> None:
    watched.window.opened(0)
    watched.tick(0, 1, done_seq=0)
    watched.now += 60.0
    watched.tick(0, 1, done_seq=0, seconds=int(LOST_S))
    assert watched.events == []
    watched.tick(0, 1, done_seq=0)
    assert [event[:2] for event in watched.events] == [("lost", 0), ("lost", 1)]
