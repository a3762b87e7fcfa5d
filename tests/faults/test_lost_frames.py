"""A transport that loses frames: every step still arrives on every rank, once and in order."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.groups import launch
from support.impostor import IMPOSTOR
from support.losing import LOSE
from support.polling import wait_until

import zspmd
from zspmd.transport.frames import STEP_HEADER

pytestmark = pytest.mark.usefixtures("leak_check")
NUM_STEPS = 3000
WORLD_SIZE = 3


@pytest.mark.timeout(300)
async def test_three_thousand_steps_arrive_in_order_although_one_frame_in_fifty_is_lost() -> None:
    async with launch("Diary", WORLD_SIZE, window=8, preload=("support.lossy",)) as group:
        answers: list[list[Any]] = []

        async def ask(number: int) -> None:
            answers.append(await group.step(number))

        numbers = iter(range(NUM_STEPS))  # shared by eight askers, so that the window is full

        async def ask_the_rest() -> None:
            for number in numbers:
                await ask(number)

        await asyncio.gather(*(ask_the_rest() for _ in range(8)))
        diaries = await group.call("diary")
        assert diaries == [list(range(NUM_STEPS))] * WORLD_SIZE
        assert sorted(answer[0] for answer in answers) == list(range(NUM_STEPS))
        assert all(answer == answer[:1] * WORLD_SIZE for answer in answers)
        statistics = group.statistics()
        lost = 0.02 * NUM_STEPS * WORLD_SIZE
        assert statistics.replayed_frames > lost / 2
        assert (statistics.in_flight, statistics.late_answers) == (0, 0)
        await wait_until(lambda: sum(health.gaps for health in group.health()) > lost / 4)  # neighbours are one gap


async def test_a_lost_end_of_the_stream_is_told_by_a_tick() -> None:
    """Steps one at a time: a lost one is always the last, which no later frame can give away."""
    async with launch("Diary", WORLD_SIZE, preload=("support.lossy",)) as group:
        for number in range(150):
            assert await group.step(number) == [number] * WORLD_SIZE
        assert group.statistics().replayed_frames > 0
        replayed = [event async for event in _until(group, "replayed")]
        assert replayed[-1].kind == "replayed"
        assert replayed[-1].rank in range(WORLD_SIZE)


async def test_a_frame_that_is_not_kept_any_more_ends_the_group_with_the_name_of_the_rank() -> None:
    async with launch("Diary", 2, preload=("support.amnesiac",)) as group:
        with pytest.raises(zspmd.StepGapError, match="rank 1: expected frame 0, got 1") as caught:
            await group.step(None)
        assert caught.value.rank == 1
        with pytest.raises(zspmd.StepGapError):
            await group.step(None)


async def test_reminders_that_piled_up_while_a_rank_was_busy_have_its_frames_sent_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOSE, "1:2-2x1")
    async with launch("Gate", 2, preload=("support.losing",)) as group:
        busy = await group.submit({"path": str(tmp_path / "gate"), "ranks": [0, 1]})
        lost = await group.submit({"path": "", "ranks": []})
        sent_bytes = group.statistics().sent_bytes
        await wait_until(lambda: group.statistics().sent_bytes >= sent_bytes + 3 * STEP_HEADER.size)  # three ticks
        (tmp_path / "gate").touch()
        assert [await busy, await lost] == [[0, 1], [0, 1]]
        assert await group.call("wait", "", []) == [0, 1]  # behind whatever rank 1 had asked for
        assert group.statistics().replayed_frames == 1


@pytest.mark.parametrize("kind", ["GAP", "ERROR", "OUTPUT"])
async def test_the_word_of_a_rank_that_does_not_exist_ends_the_group(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(IMPOSTOR, kind)
    async with launch("Diary", 1, preload=("support.impostor",)) as group:
        with pytest.raises(zspmd.ProtocolError, match="rank 500 answered frame 1 with what it must not"):
            await group.step(None)


async def _until(group: zspmd.WorkerGroup, kind: str) -> Any:
    async for event in group.events():
        yield event
        if event.kind == kind:
            return
