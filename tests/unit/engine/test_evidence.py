"""Which faults are evidence against the requests that were being computed."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any, cast

import pytest

from zspmd.config import Deadlines
from zspmd.errors import PeerLostError, WorkerExitedError, WorkerRaisedError, WorkerStalledError, ZspmdError
from zspmd.runtime.driver.group import WorkerGroup
from zspmd.runtime.driver.statistics import RankHealth
from zspmd.runtime.engine.evidence import is_from_inside


def group_with_beats(*ages: float | None) -> WorkerGroup:
    """What is asked of a group: when its ranks last beat, and how often they should."""
    health = [RankHealth(rank, "step", 1, "localhost", 0, 0, age, 0) for rank, age in enumerate(ages)]
    group: Any = SimpleNamespace(health=lambda: health, config=SimpleNamespace(deadlines=Deadlines(beat_s=1.0)))
    return cast(WorkerGroup, group)


@pytest.mark.parametrize(
    ("error", "is_inside"),
    [
        (WorkerRaisedError("raised RuntimeError in its step: out of memory", rank=0), True),
        (WorkerRaisedError("raised RuntimeError in its step: Connection closed by peer [::1]", rank=0), False),
        (WorkerExitedError(exit_code=0, rank=0), True),
        (WorkerExitedError(exit_code=7, rank=0), True),
        (WorkerExitedError(exit_code=-signal.SIGSEGV, rank=0), True),
        (WorkerExitedError(exit_code=-signal.SIGABRT, rank=0), True),
        (WorkerExitedError(exit_code=-signal.SIGKILL, rank=0), False),
        (WorkerExitedError(exit_code=-signal.SIGTERM, rank=0), False),
        (PeerLostError("the agent is gone"), False),
    ],
    ids=["raised", "a peer was lost", "exit 0", "exit 7", "SIGSEGV", "SIGABRT", "SIGKILL", "SIGTERM", "agent"],
)
def test_how_it_ended_decides(error: ZspmdError, is_inside: bool) -> None:
    assert is_from_inside(error, group_with_beats(0.1)) is is_inside


@pytest.mark.parametrize(
    ("ages", "is_inside"),
    [((0.5, 60.0), True), ((60.0, 0.5), False), ((None, 0.5), False)],
    ids=["beats and does not get on", "is silent, as if stopped", "never beat"],
)
def test_a_rank_that_is_late_must_beat(ages: tuple[float | None, ...], is_inside: bool) -> None:
    error = WorkerStalledError("no answer", missing=[0], rank=0)
    assert is_from_inside(error, group_with_beats(*ages)) is is_inside


def test_one_silent_rank_explains_why_others_are_late() -> None:
    error = WorkerStalledError("no answer", missing=[0, 1], rank=0)
    assert not is_from_inside(error, group_with_beats(0.5, 60.0))
