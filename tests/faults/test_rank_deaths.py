"""Any rank ends, in any way, at any moment: every await raises who it was within a second, and nothing is left.

Each run is drawn from its seed, which a failure names; the quick part takes a few seeds a moment, the long part hundreds.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.doomed import WAYS, ended_at
from support.groups import DEADLINES
from support.latencies import Latencies
from support.leaks import LeakCheck

import zspmd
from zspmd.errors import WorkerError, WorkerExitedError, WorkerRaisedError

DETECTION_S = 1.0
PATIENT = replace(DEADLINES, step_s=600.0, collective_s=600.0, drain_s=600.0)  # nothing here may depend on any of these
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)


def counts(quick: int, long: int) -> pytest.MarkDecorator:
    """Run a test with a few seeds, and with hundreds in the long part."""
    return pytest.mark.parametrize("count", [pytest.param(quick, id="quick"), pytest.param(long, id="long", marks=pytest.mark.long)])


@dataclass(frozen=True)
class Death:
    """One run: who ends, how and when; everything else follows from it."""

    seed: int
    moment: str
    world_size: int
    rank: int
    way: str
    signal: int  # where it comes from outside
    delay_s: float
    communicator: str

    @property
    def preload(self) -> tuple[str, ...]:
        return ("torch",) if self.moment in ("collective", "raise") else ()

    @classmethod
    def drawn(cls, seed: int, moment: str, max_delay_s: float = 0.02) -> Death:
        chance = random.Random(f"{moment}/{seed}")
        world_size = chance.randint(2, 3)
        delay_s = chance.random() * max_delay_s
        way = sorted(WAYS)[(seed + len(moment)) % len(WAYS)]  # so that a few seeds have many
        communicator = "gloo" if moment in ("collective", "raise") and seed % 2 else "shm"
        return cls(seed, moment, world_size, chance.randrange(world_size), way, chance.choice(SIGNALS), delay_s, communicator)


def doomed_group(death: Death, tmp_path: Path, worker: str = "support.doomed:Doomed", **options: Any) -> zspmd.WorkerGroup:
    doom = {"rank": death.rank, "way": death.way, "moment": death.moment, "path": str(tmp_path / "ended"), "delay_s": death.delay_s}
    defaults: dict[str, Any] = {"output_ranks": "all", "preload": (), "deadlines": PATIENT, "on_log": lambda *_: None}
    return zspmd.launch(worker, world_size=death.world_size, worker_args={"doom": doom}, **{**defaults, **options})


def check_blame(error: object, death: Death, pid: int | None, outcome: int | str) -> WorkerError:
    """Check who is blamed and for what: an exit code, or the type of an exception."""
    assert isinstance(error, WorkerError), (death, error)
    assert (error.rank, error.pid) == (death.rank, pid or error.pid), death
    assert error.pid, death
    assert error.host in (os.uname().nodename, "localhost"), death  # the latter before its hello, which tells the name
    if isinstance(outcome, str):
        assert isinstance(error, WorkerRaisedError), (death, error)
        assert error.exception_type == outcome, death
    else:
        assert isinstance(error, WorkerExitedError), (death, error)
        assert error.exit_code == outcome, death
    peers = [f"rank {rank}: " for rank in range(death.world_size) if rank != death.rank]
    assert all(line.startswith(tuple(peers)) for line in error.consequences), (death, error.consequences)
    return error


@pytest.fixture
def latencies(request: pytest.FixtureRequest) -> Iterator[Latencies]:
    """Times from the death to the last await that raises it, shown at the end of the run."""
    collected = Latencies(f"from the fault to its error in {request.node.name}", DETECTION_S)
    yield collected
    collected.publish(request)


@counts(quick=2, long=60)
@pytest.mark.parametrize("moment", ["import", "setup", "step", "collective"])
async def test_a_rank_that_ends_by_itself_is_blamed_by_every_await(
    leak_check: LeakCheck, latencies: Latencies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, count: int
) -> None:
    for seed in range(count):
        death = Death.drawn(seed, moment)
        if moment == "import":
            monkeypatch.setenv("DOOMED_RANK", str(death.rank))
            monkeypatch.setenv("DOOMED_WAY", death.way)
            monkeypatch.setenv("DOOMED_PATH", str(tmp_path / "ended"))
        errors, seen_at = await meet_own_end(death, tmp_path)
        latencies.add(seen_at - ended_at(tmp_path / "ended"), death)
        for error in errors:
            told = check_blame(error, death, None, WAYS[death.way][1])
            assert told is errors[0], death
        assert told.step_id == (1 if moment in ("step", "collective") else None), death
        assert moment == "import" or told.log_tail[0] == f"rank {death.rank} sets up", death
        leak_check.wait_gone()


async def meet_own_end(death: Death, tmp_path: Path) -> tuple[list[object], float]:
    """Run a group whose rank ends by itself; return what its awaits raised, and when the last one did."""
    worker = "support.doomed_import:Doomed" if death.moment == "import" else "support.doomed:Doomed"
    group = doomed_group(death, tmp_path, worker, window=2, communicator=death.communicator, preload=death.preload)
    if death.moment in ("import", "setup"):
        asks: list[Awaitable[Any]] = [group.start()]
    else:
        await group.start()
        await group.step(0)
        # Two are in flight, the others wait for room.
        asks = [group.step("doom"), *(group.step(1) for _ in range(3)), group.call("absent")]
    errors = await asyncio.gather(*asks, return_exceptions=True)
    seen_at = time.monotonic()
    await group.aclose()
    return list(errors), seen_at


@counts(quick=3, long=150)
@pytest.mark.parametrize("moment", ["start", "idle", "load", "shutdown"])
async def test_a_rank_that_is_killed_at_a_random_moment_is_blamed(
    leak_check: LeakCheck, latencies: Latencies, tmp_path: Path, moment: str, count: int
) -> None:
    meet = {"start": meet_in_start, "idle": meet_idle, "load": meet_under_load, "shutdown": meet_in_shutdown}[moment]
    for seed in range(count):
        death = Death.drawn(seed, moment, max_delay_s={"start": 0.3, "idle": 0.02, "load": 0.1, "shutdown": 0.02}[moment])
        group = doomed_group(death, tmp_path)
        exits = asyncio.ensure_future(exit_codes(group))
        pid, killed_at, seen_at, error = await meet(group, death)
        if error is None:  # the signal met a rank that had just ended by itself: only in a shutdown
            assert moment == "shutdown", death
            assert (await exits)[death.rank] == "exited with code 0", death
        else:
            check_blame(error, death, pid, -death.signal)
            latencies.add(seen_at - killed_at, death)
            assert (await exits)[death.rank].startswith(f"was ended by {signal.Signals(death.signal).name}"), death
        leak_check.wait_gone()


Met = tuple[int, float, float, "BaseException | None"]  # pid, when it was killed, when that was known, what was raised


async def meet_in_start(group: zspmd.WorkerGroup, death: Death) -> Met:
    """Kill the rank some time after it has got a process: before its hello, in its imports, its set-up, its SYNC, or just after."""
    starting = asyncio.ensure_future(group.start())

    async def use() -> None:
        await starting
        await group.step(1)  # it was ready before the kill

    async for event in group.events():
        if event.kind == "started" and event.rank == death.rank:
            pid = int(event.detail.split()[1])
            break
    await asyncio.sleep(death.delay_s)
    killed_at = kill(pid, death)
    with pytest.raises(WorkerError) as caught:
        await use()
    seen_at = time.monotonic()
    await group.aclose()
    return pid, killed_at, seen_at, caught.value


async def meet_idle(group: zspmd.WorkerGroup, death: Death) -> Met:
    """Kill the rank while nothing is asked of it; the events tell, and then every use."""
    await group.start()
    pid = pid_of(group, death.rank)
    killed_at = kill(pid, death)
    async for event in group.events():
        if event.kind == "failed":
            break
    seen_at = time.monotonic()
    errors = await asyncio.gather(group.step(1), group.submit(1), group.call("absent"), return_exceptions=True)
    assert {id(error) for error in errors} == {id(group.fault)}, death
    await group.aclose()
    return pid, killed_at, seen_at, group.fault


async def meet_under_load(group: zspmd.WorkerGroup, death: Death) -> Met:
    """Kill the rank while eight askers keep its window full, and each of them must be told."""
    await group.start()
    pid = pid_of(group, death.rank)

    async def ask_until_it_fails() -> WorkerError:
        while True:
            try:
                assert await group.step(7) == [7] * death.world_size
            except WorkerError as error:
                return error

    asking = [asyncio.ensure_future(ask_until_it_fails()) for _ in range(8)]
    await asyncio.sleep(death.delay_s)
    killed_at = kill(pid, death)
    errors = await asyncio.gather(*asking)
    seen_at = time.monotonic()
    assert {id(error) for error in errors} == {id(group.fault)}, death
    await group.aclose()
    return pid, killed_at, seen_at, group.fault


async def meet_in_shutdown(group: zspmd.WorkerGroup, death: Death) -> Met:
    """Kill the rank while the group closes: in its drain, at STOP, in its teardown, or when it has just ended."""
    await group.start()
    pid = pid_of(group, death.rank)
    await group.submit(1)
    closing = asyncio.ensure_future(group.aclose())
    await asyncio.sleep(death.delay_s)
    killed_at = kill(pid, death)
    (error,) = await asyncio.gather(closing, return_exceptions=True)
    return pid, killed_at, time.monotonic(), error


def kill(pid: int, death: Death) -> float:
    """Send the signal, and return when; a rank that is gone already needs none."""
    killed_at = time.monotonic()
    try:
        os.kill(pid, death.signal)
    except ProcessLookupError:
        pass
    return killed_at


def pid_of(group: zspmd.WorkerGroup, rank: int) -> int:
    pid = group.health()[rank].pid
    assert pid is not None
    return pid


async def exit_codes(group: zspmd.WorkerGroup) -> dict[int | None, str]:
    """Return how each rank ended, in words, once the group is closed."""
    exited = [event async for event in group.events() if event.kind == "exited"]
    return {event.rank: event.detail.partition(" ")[2].partition(" ")[2] for event in exited}


@pytest.mark.parametrize("way", WAYS)
async def test_a_rank_that_ends_in_its_teardown_is_raised_by_the_closing(leak_check: LeakCheck, tmp_path: Path, way: str) -> None:
    death = replace(Death.drawn(0, "teardown"), way=way)
    group = doomed_group(death, tmp_path)
    await group.start()
    assert await group.step(1) == [1] * death.world_size
    with pytest.raises(WorkerError) as caught:
        await group.aclose()
    assert time.monotonic() - ended_at(tmp_path / "ended") < DETECTION_S
    check_blame(caught.value, death, None, WAYS[way][1])


@counts(quick=1, long=500)
async def test_a_rank_that_raises_is_blamed_while_its_peers_are_stuck_in_a_collective(
    leak_check: LeakCheck, latencies: Latencies, tmp_path: Path, count: int
) -> None:
    """Their collectives have 600 s; the rank that raises is one that answers or one that does not."""
    for seed in range(count):
        death = replace(Death.drawn(seed, "raise"), moment="collective", way="raise")
        outputs = [0] if seed // 2 % 2 else [death.rank]
        group = doomed_group(death, tmp_path, communicator=death.communicator, preload=death.preload, output_ranks=outputs)
        await group.start()
        await group.step(1)
        errors = await asyncio.gather(group.step("doom"), group.step(1), group.call("absent"), return_exceptions=True)
        latencies.add(time.monotonic() - ended_at(tmp_path / "ended"), death)
        await group.aclose()
        assert {id(error) for error in errors} == {id(group.fault)}, (death, errors)
        error = check_blame(group.fault, death, None, "builtins.RuntimeError")
        assert isinstance(error, WorkerRaisedError)
        assert error.step_id == 1, death
        assert "RuntimeError: this rank raises" in error.remote_traceback, death
        leak_check.wait_gone()
