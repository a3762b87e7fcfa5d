"""Many launches: step 0 reaches every rank of each, none takes another's frames, ports or id, and nothing is left."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest
from support.groups import DEADLINES, launch
from support.leaks import LeakCheck

import zspmd
from zspmd.errors import EndpointInUseError
from zspmd.runtime.launch.ports import first_candidate

AT_ONCE = 3
NUM_COLLIDING = 6
NUM_STEPS = 20


async def launch_once(number: int) -> None:
    async with launch("Echo") as group:
        answers = await group.step({"launch": number})
        assert answers == [{"rank": rank, "inputs": {"launch": number}} for rank in (0, 1)]
        assert group.statistics().foreign_frames == 0


@pytest.mark.parametrize("num_launches", [8, pytest.param(500, marks=pytest.mark.long)])
async def test_step_0_reaches_both_ranks_of_every_launch(leak_check: LeakCheck, num_launches: int) -> None:
    numbers = iter(range(num_launches))  # shared: each worker of the test takes the next

    async def launch_the_rest() -> None:
        for number in numbers:
            await launch_once(number)

    began = time.monotonic()
    tasks = [asyncio.ensure_future(launch_the_rest()) for _ in range(AT_ONCE)]
    _, unfinished = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    for task in unfinished:
        task.cancel()
    await asyncio.gather(*tasks)
    print(f"{num_launches} launches, {AT_ONCE} at once: {time.monotonic() - began:.0f} s")
    assert leak_check.processes() == {}


def launch_named(launch_id: str) -> zspmd.WorkerGroup:
    options: dict[str, Any] = {"world_size": 2, "output_ranks": "all", "preload": (), "deadlines": DEADLINES}
    return zspmd.launch("support.launched:Named", launch_id=launch_id, **options)


def colliding_ids(count: int) -> list[str]:
    """Return launch ids that all hash to the same first port."""
    by_port: dict[int, list[str]] = {}
    for number in itertools.count():
        ids = by_port.setdefault(first_candidate(f"same-{number}", "master"), [])
        ids.append(f"same-{number}")
        if len(ids) == count:
            return ids
    raise AssertionError("unreachable")


async def test_launches_that_hash_to_one_port_share_neither_port_nor_frame(leak_check: LeakCheck) -> None:
    ids = colliding_ids(NUM_COLLIDING)
    all_ready, num_ready = asyncio.Event(), 0

    async def run(launch_id: str) -> int:
        nonlocal num_ready
        async with launch_named(launch_id) as group:
            num_ready += 1
            if num_ready == NUM_COLLIDING:
                all_ready.set()
            await asyncio.wait_for(all_ready.wait(), 60.0)
            ports = set()
            for number in range(NUM_STEPS):
                for answer in await group.step([launch_id, number]):
                    assert (answer["launch_id"], answer["inputs"]) == (launch_id, [launch_id, number])
                    ports.add(answer["port"])
            assert group.statistics().foreign_frames == 0
            (port,) = ports
            return int(port)

    ports = await asyncio.gather(*map(run, ids))
    assert len(set(ports)) == NUM_COLLIDING
    assert leak_check.processes() == {}


async def test_of_launches_with_one_id_at_once_one_wins_and_the_rest_are_told_its_pid() -> None:
    groups = [launch_named("same") for _ in range(4)]
    outcomes = await asyncio.gather(*(group.start() for group in groups), return_exceptions=True)
    losers = [error for error in outcomes if error is not None]
    assert len(losers) == len(groups) - 1
    for error in losers:
        assert isinstance(error, EndpointInUseError)
        assert str(error) == f"launch id 'same' is held by pid {os.getpid()}; end that launch or choose another id"
    winner = groups[outcomes.index(None)]
    assert [answer["inputs"] for answer in await winner.step("mine")] == ["mine"] * 2
    await winner.aclose()
    async with launch_named("same") as group:
        assert [answer["launch_id"] for answer in await group.step("free again")] == ["same"] * 2


CONTENDER = textwrap.dedent(
    """
    import asyncio, json, os, sys
    import zspmd

    async def main():
        try:
            async with zspmd.launch("support.launched:Named", launch_id="same", world_size=1, preload=()) as group:
                (answer,) = await group.step(os.getpid())
                print(json.dumps({"pid": os.getpid(), "answer": answer["inputs"]}), flush=True)
                await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        except zspmd.EndpointInUseError as error:
            print(json.dumps({"pid": os.getpid(), "error": str(error)}), flush=True)

    asyncio.run(main())
    """
)


def test_of_processes_that_launch_one_id_at_once_one_wins() -> None:
    with LeakCheck() as leak_check:
        contenders = [
            subprocess.Popen(
                [sys.executable, "-c", CONTENDER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
            for _ in range(3)
        ]
        outcomes = [json.loads(contender.stdout.readline()) for contender in contenders if contender.stdout is not None]
        (winner,) = (outcome for outcome in outcomes if "answer" in outcome)
        assert winner["answer"] == winner["pid"]
        errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
        assert errors == [f"launch id 'same' is held by pid {winner['pid']}; end that launch or choose another id"] * 2
        for contender in contenders:
            contender.communicate("\n", timeout=30)
        leak_check.check()
