"""Harm on the way between driver and ranks, over TCP: through a proxy that drops, doubles, swaps, damages, delays and cuts.

Whatever happens, no answer is wrong and none is silently left out: either every step is answered, once and in order, or an error
names the rank.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cut_link import CANNOT, STEPS_AFTER
from support.groups import launch
from support.leaks import LeakCheck
from support.tcp_proxy import Direction, Harm, Passing, TcpProxy, messages, pass_on, swapped

import zspmd
from zspmd.errors import AnswerLostError, WorkerExitedError
from zspmd.runtime.driver import launch_site, processes, watch
from zspmd.transport import security
from zspmd.transport.records import Bootstrap, Welcome

SOCKETS = ("step", "result", "control")
LOST_S = 1.0  # in place of the driver's own: until an answer that does not come is given up


class Proxies:
    """A proxy before each of the driver's sockets, for the launches made while it is entered."""

    def __init__(self, **harms: Harm) -> None:
        self._stack = contextlib.ExitStack()
        self._by_name: dict[str, TcpProxy] = {}
        self._harms = harms

    def __enter__(self) -> Proxies:
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        for user, record, names in (
            (processes, Welcome, ("step_endpoint", "result_endpoint")),
            (launch_site, Bootstrap, ("control_endpoint",)),
        ):
            patch.setattr(user, record.__name__, self._redirected(record, names))
        return self

    def __exit__(self, *exit_facts: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> TcpProxy:
        return self._by_name[name]

    def _redirected(self, record: type, names: tuple[str, ...]) -> Callable[..., object]:
        def make(**fields: Any) -> object:
            return record(**{key: self._redirect(key, value) if key in names else value for key, value in fields.items()})

        return make

    def _redirect(self, field: str, endpoint: str) -> str:
        name = field.removesuffix("_endpoint")
        if name not in self._by_name:
            host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
            self._by_name[name] = self._stack.enter_context(TcpProxy((host, int(port)), self._harms.get(name, pass_on)))
        address = self._by_name[name].address
        return f"tcp://{address[0]}:{address[1]}"


def message_harm(direction: Direction, wanted: Callable[[int], bool], harm: Callable[[bytes], list[bytes]]) -> Harm:
    """Harm those messages of one direction whose number is wanted."""

    def apply(passing: Passing) -> list[bytes]:
        return harm(passing.data) if passing.direction == direction and wanted(passing.index) else [passing.data]

    return messages(apply)


def drop(data: bytes) -> list[bytes]:
    return []


def double(data: bytes) -> list[bytes]:
    return [data, data]


def damage(data: bytes) -> list[bytes]:
    return [data[:-1] + bytes([data[-1] ^ 1])]


async def run_steps(group: zspmd.WorkerGroup, count: int, *, first: int = 0, timeout_s: float = 20.0) -> None:
    """Run steps that each rank answers with its own count, and check every answer; ``first`` steps were run before."""
    for index in range(first, first + count):
        assert await group.step(index, timeout_s=timeout_s) == [[rank, index, index] for rank in range(group.world_size)]


def launch_tcp(**options: Any) -> zspmd.WorkerGroup:
    return launch("Counting", bind="127.0.0.1", **options)


async def test_a_slow_wire_changes_nothing(leak_check: LeakCheck) -> None:
    with Proxies() as proxies:
        async with launch_tcp() as group:
            for name in SOCKETS:
                proxies[name].delay_s = 0.01
            await run_steps(group, 20)
            assert group.statistics().replayed_frames == 0


async def test_steps_that_are_dropped_are_sent_again(leak_check: LeakCheck) -> None:
    with Proxies(step=message_harm("down", lambda index: index % 7 == 5, drop)):
        async with launch_tcp() as group:
            pending = [await group.submit(index, timeout_s=20) for index in range(60)]
            for index, answers in enumerate(pending):
                assert await answers == [[rank, index, index] for rank in range(2)]
            assert group.statistics().replayed_frames > 0


async def test_an_answer_that_is_dropped_is_named(leak_check: LeakCheck) -> None:
    """The next answer shows it."""

    async def run() -> None:
        async with launch_tcp() as group:
            for pending in [await group.submit(index, timeout_s=20) for index in range(20)]:
                await pending

    with (
        Proxies(result=message_harm("up", lambda index: index == 5, drop)),
        pytest.raises(AnswerLostError, match="answer to frame") as caught,
    ):
        await run()
    assert caught.value.rank in (0, 1)


async def test_a_last_answer_that_is_dropped_is_named(leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing follows it but the rank's beats, which say that it has answered."""
    monkeypatch.setattr(watch, "LOST_S", LOST_S)
    is_dropping = False

    async def run() -> None:
        nonlocal is_dropping
        async with launch_tcp(deadlines=zspmd.Deadlines(beat_s=0.2)) as group:
            await run_steps(group, 5)
            is_dropping = True
            await group.step(5, timeout_s=60)

    dropping = message_harm("up", lambda index: is_dropping, drop)
    with Proxies(result=dropping), pytest.raises(AnswerLostError, match="it was sent and never came"):
        await run()


HARMS: dict[str, tuple[str, Harm]] = {}
for _socket, _direction in (("step", "down"), ("result", "up"), ("control", "up")):
    for _name, _harm in (("doubled", double), ("damaged", damage)):
        HARMS[f"{_socket} {_name}"] = (_socket, message_harm(_direction, lambda index: index == 6, _harm))  # type: ignore[arg-type]
    HARMS[f"{_socket} swapped"] = (_socket, swapped(_direction, 6))  # type: ignore[arg-type]


@pytest.mark.parametrize(("socket", "harm"), HARMS.values(), ids=HARMS.keys())
async def test_what_was_tampered_with_ends_the_connection_and_its_rank(
    leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch, socket: str, harm: Harm
) -> None:
    monkeypatch.setattr(watch, "LOST_S", LOST_S)

    async def run() -> None:
        async with launch_tcp(deadlines=zspmd.Deadlines(beat_s=0.05)) as group:
            await run_steps(group, 2000)

    with Proxies(**{socket: harm}), pytest.raises((WorkerExitedError, AnswerLostError)) as caught:
        await run()
    if isinstance(caught.value, WorkerExitedError):
        assert any(f"{socket} connection" in line for line in caught.value.log_tail)


@pytest.mark.parametrize("socket", SOCKETS)
@pytest.mark.parametrize("how", ["reset", "half-closed by the driver", "half-closed by the rank"])
async def test_a_broken_connection_names_itself(leak_check: LeakCheck, socket: str, how: str) -> None:
    async def run(proxies: Proxies) -> None:
        async with launch_tcp() as group:
            await run_steps(group, 5)
            if how == "reset":
                proxies[socket].reset()
            else:
                proxies[socket].half_close("down" if how.endswith("driver") else "up")
            await run_steps(group, 100_000, first=5)

    with Proxies() as proxies, pytest.raises(WorkerExitedError) as caught:
        await run(proxies)
    assert any(f"{socket} connection" in line for line in caught.value.log_tail)


async def cut_link(seconds: float) -> dict[str, Any]:
    """Run a driver whose network is cut for a while, and return what it says of itself."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    argv = [sys.executable, "-m", "support.cut_link", str(seconds)]
    process = await asyncio.create_subprocess_exec(*argv, env=environment, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    if process.returncode == CANNOT:
        pytest.skip("a network namespace of its own needs root, or user namespaces")
    outcome: dict[str, Any] = json.loads(output)
    return outcome


async def test_a_cut_of_a_second_costs_a_second(leak_check: LeakCheck) -> None:
    outcome = await cut_link(1)
    assert (outcome["error"], outcome["is_right"]) == ("", True)
    assert outcome["done"] >= 50 + STEPS_AFTER


@pytest.mark.parametrize("seconds", [8, pytest.param(30, marks=pytest.mark.long)])
async def test_a_longer_cut_is_the_end_and_is_named_while_it_lasts(leak_check: LeakCheck, seconds: int) -> None:
    """What heals later finds nobody to go on with."""
    outcome = await cut_link(seconds)
    assert "connection to the driver broke" in outcome["error"]
    assert outcome["is_right"]
    assert outcome["after_s"] < 6


@pytest.mark.parametrize("pause_s", [0.8, pytest.param(10.0, marks=pytest.mark.long)])
async def test_a_rank_that_is_stopped_keeps_a_connection_that_is_full(
    leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch, pause_s: float
) -> None:
    """Its kernel answers, but has no room for more; only an end that receives may take that for a cut."""
    monkeypatch.setattr(security, "CUT_MS", 300)
    async with launch("Echo", bind="127.0.0.1") as group:
        pid = group.health()[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        pending = [await group.submit(np.zeros(16 << 20, np.uint8)) for _ in range(2)]
        await asyncio.sleep(pause_s)
        os.kill(pid, signal.SIGCONT)
        assert [len(await answers) for answers in pending] == [2, 2]


def random_harm(seed: int) -> Harm:
    """Harm one message in fifty, once the group is ready."""
    chance = random.Random(seed)
    return messages(
        lambda passing: (
            chance.choice((drop, double, damage))(passing.data) if passing.index > 4 and chance.random() < 0.02 else [passing.data]
        )
    )


@pytest.mark.parametrize("seeds", [pytest.param(range(3), id="some"), pytest.param(range(3, 60), id="many", marks=pytest.mark.long)])
async def test_random_harm_never_makes_a_wrong_answer(leak_check: LeakCheck, seeds: range) -> None:
    for seed in seeds:
        with Proxies(step=random_harm(seed), result=random_harm(-seed)), contextlib.suppress(WorkerExitedError, AnswerLostError):
            async with launch_tcp(deadlines=zspmd.Deadlines(beat_s=0.2)) as group:
                await run_steps(group, 200)
