"""Three hundred launches in a row: step 0 reaches every rank of each, none takes another's frames, and nothing is left."""

from __future__ import annotations

import asyncio
import time

import pytest
from support.groups import launch
from support.leaks import LeakCheck

NUM_LAUNCHES = 300
AT_ONCE = 3


async def launch_once(number: int) -> None:
    async with launch("Echo") as group:
        answers = await group.step({"launch": number})
        assert answers == [{"rank": rank, "inputs": {"launch": number}} for rank in (0, 1)]
        assert group.statistics().foreign_frames == 0


@pytest.mark.timeout(900)
async def test_step_0_reaches_both_ranks_of_every_launch(leak_check: LeakCheck) -> None:
    numbers = iter(range(NUM_LAUNCHES))  # shared: each worker of the test takes the next

    async def launch_the_rest() -> None:
        for number in numbers:
            await launch_once(number)

    began = time.monotonic()
    tasks = [asyncio.ensure_future(launch_the_rest()) for _ in range(AT_ONCE)]
    _, unfinished = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in unfinished:
        task.cancel()
    await asyncio.gather(*tasks)
    print(f"{NUM_LAUNCHES} launches, {AT_ONCE} at once: {time.monotonic() - began:.0f} s")
    assert leak_check.processes() == {}
