"""A rank that hangs is named at its step's deadline with the stacks of all; one that is slow, or a driver that was paused, is no fault."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from support.groups import DEADLINES, launch
from support.hanging import WAYS
from support.latencies import Latencies
from support.leaks import LeakCheck
from support.polling import wait_until

import zspmd
from zspmd.errors import WorkerStalledError
from zspmd.runtime.engine.ranks import EngineRanks

TESTS = Path(__file__).parents[1]
STEP_S = 0.5
OVERRUN_S = 1.0
WORLD_SIZE = 3
QUIET = replace(DEADLINES, collective_s=600.0, drain_s=0.5, kill_s=1.0)


def hanging_group(worker: str = "Hanging", **options: Any) -> zspmd.WorkerGroup:
    defaults: dict[str, Any] = {"output_ranks": "all", "preload": (), "deadlines": QUIET, "on_log": lambda *_: None}
    return zspmd.launch(f"support.hanging:{worker}", world_size=WORLD_SIZE, **{**defaults, **options})


def in_words(way: str) -> str:
    """Return what the stacks of a rank that hangs in this way must show."""
    return "stopped by a signal" if way == "is stopped" else WAYS[way].__name__


@pytest.mark.parametrize("count", [pytest.param(1, id="quick"), pytest.param(25, id="long", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("way", "communicator"),
    [*((way, None) for way in WAYS if "collective" not in way), ("skips a collective", "shm"), ("skips a collective", "gloo")],
    ids=lambda value: str(value).replace(" ", "_"),
)
async def test_a_rank_that_hangs_is_named_at_the_deadline_with_all_stacks(
    leak_check: LeakCheck, request: pytest.FixtureRequest, way: str, communicator: str | None, count: int
) -> None:
    latencies = Latencies(f"from the deadline to the error of a rank that {way} ({communicator or 'no collective'})", OVERRUN_S)
    for run in range(count):
        options: dict[str, Any] = (
            {"worker_args": {"collective": True}, "communicator": communicator, "preload": ("torch",)} if communicator else {}
        )
        group = hanging_group(**options)
        await group.start()
        await group.step(0)
        began = time.monotonic()
        with pytest.raises(WorkerStalledError) as caught:
            await group.step(way, timeout_s=STEP_S)
        elapsed_s = time.monotonic() - began
        error = caught.value
        assert elapsed_s >= STEP_S
        latencies.add(elapsed_s - STEP_S, f"run {run}")
        assert error.rank == 1, error
        assert error.missing == ((0, 1, 2) if communicator else (1,)), error
        assert sorted(error.stacks) == [0, 1, 2]
        assert in_words(way) in error.stacks[1], error
        assert (error.step_id, error.pid) == (1, group.health()[1].pid), error
        assert "phase " in str(error)
        if communicator:
            assert all("all_reduce" in error.stacks[rank] for rank in (0, 2)), error
        await group.aclose(abort=True)
        leak_check.wait_gone()
    latencies.publish(request)


async def test_stacks_are_given_on_demand_and_the_ranks_go_on(leak_check: LeakCheck) -> None:
    async with hanging_group("Slow") as group:
        steps = [asyncio.ensure_future(group.step(number)) for number in range(40)]
        for _ in range(5):
            stacks = await group.dump_stacks()
            assert sorted(stacks) == [0, 1, 2]
            assert all("File " in text for text in stacks.values()), stacks
        assert await asyncio.gather(*steps) == [[2 * number] * WORLD_SIZE for number in range(40)]


async def test_a_rank_that_is_stopped_for_a_while_is_no_fault(leak_check: LeakCheck) -> None:
    """Its silence is told and has no consequence; so is its return."""
    async with hanging_group(deadlines=replace(QUIET, beat_s=0.1)) as group:
        pid = group.health()[1].pid
        assert pid is not None
        pending = await group.submit(1)
        assert await pending == [1] * WORLD_SIZE
        seen: list[str] = []

        async def watch() -> None:
            async for event in group.events():
                seen.append(event.kind)

        watching = asyncio.ensure_future(watch())
        os.kill(pid, signal.SIGSTOP)
        answer = asyncio.ensure_future(group.step(2))
        await wait_until(lambda: "silent" in seen)
        assert not answer.done()
        os.kill(pid, signal.SIGCONT)
        assert await answer == [2] * WORLD_SIZE
        await wait_until(lambda: "heard" in seen)
    await watching
    assert not {"failed", "stalled"} & set(seen)


@contextmanager
def saturated_cores() -> Iterator[None]:
    """Keep every core busy, twice."""
    command = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(command) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


@pytest.mark.parametrize("duration_s", [pytest.param(5.0, id="quick"), pytest.param(600.0, id="long", marks=pytest.mark.long)])
async def test_a_slow_rank_on_saturated_cores_is_no_fault(leak_check: LeakCheck, request: pytest.FixtureRequest, duration_s: float) -> None:
    """One rank computes ten times as long as its peers, every core is taken twice, and beats are frequent."""
    num_steps = 0
    async with hanging_group("Slow", deadlines=replace(QUIET, beat_s=0.1, drain_s=30.0), window=8) as group:
        with saturated_cores():
            until = time.monotonic() + duration_s
            while time.monotonic() < until:
                answers = await asyncio.gather(*(group.step(number) for number in range(16)))
                assert answers == [[2 * number] * WORLD_SIZE for number in range(16)]
                num_steps += 16
    kinds = [event.kind async for event in group.events()]
    assert not {"failed", "stalled"} & set(kinds)
    silences = kinds.count("silent")
    request.node.user_properties.append(("figures", f"{num_steps} steps on saturated cores: no false alarm, {silences} silences told"))


@pytest.mark.parametrize(
    ("pause_s", "count"), [pytest.param(3.0, 3, id="quick"), pytest.param(10.0, 30, id="long", marks=pytest.mark.long)]
)
async def test_a_paused_driver_blames_nobody(leak_check: LeakCheck, pause_s: float, count: int) -> None:
    """Each deadline of the driver passes while it is stopped: while its ranks load, in the middle of steps, and as it closes."""
    num_steps = 150
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "support.paused_driver", str(pause_s / 2), str(num_steps)]

    async def pause_one(seed: int) -> None:
        phase = ("steps", "load", "shutdown")[seed % 3]
        driver = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, env=environment)
        assert driver.stdout is not None
        while line := await driver.stdout.readline():
            if line.decode().strip() == phase:
                break
        assert line, f"seed {seed}: the driver never came to its {phase}"
        await asyncio.sleep(random.Random(seed).random() * {"load": 0.1, "steps": 1.0, "shutdown": 0.1}[phase])
        driver.send_signal(signal.SIGSTOP)
        await asyncio.sleep(pause_s)
        driver.send_signal(signal.SIGCONT)
        told = (await driver.stdout.read()).decode().splitlines()
        assert await driver.wait() == 0, (seed, phase)
        report = json.loads(told[-1])
        assert report == {"answers": [[total] * 2 for total in accumulate(range(num_steps))], "verdicts": []}, (seed, phase)

    for first in range(0, count, 3):
        await asyncio.gather(*(pause_one(seed) for seed in range(first, min(first + 3, count))))
    leak_check.wait_gone()


async def test_an_engine_without_room_for_a_step_raises_why_the_one_before_hangs(leak_check: LeakCheck, tmp_path: Path) -> None:
    """Rank 1 hangs after it has sent what rank 0 needs for its answer, so that the window is full before the engine thinks so."""
    group = launch("Gate", output_ranks=(0,), window=2, deadlines=replace(QUIET, step_s=STEP_S))
    await group.start()
    ranks = EngineRanks(group, lambda: None)
    gate = str(tmp_path / "gate")
    assert await (await ranks.submit({"path": gate, "ranks": [1]}, [0], [])) == [0]
    pending = await ranks.submit({"path": gate, "ranks": [0, 1]}, [0], [])
    with pytest.raises(WorkerStalledError) as caught:
        await ranks.submit({"path": gate, "ranks": []}, [0], [pending])
    assert sorted(caught.value.stacks) == [0, 1]
    await group.aclose(abort=True)
