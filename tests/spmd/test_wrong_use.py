"""Wrong use: each mistake has an error that names the value, the limit and what to do, and it is known what becomes of the group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.groups import DEADLINES

import zspmd
from zspmd.errors import ClosedError, ConfigError, ResultTakenError, TopologyError, WorkerRaisedError

pytestmark = pytest.mark.usefixtures("leak_check")
TOO_MUCH = {
    "1025 large arrays": r"the value holds 1025 arrays of more than 4096 B; the limit is 1024: stack some of them",
    "a body beyond 64 MiB": r"the value packs to 671088\d\d B; the limit is 67108864: send bulk data as arrays",
    "a set": r"value\['ranks'\]\[0\] is a builtins.set; .* send a list",
}


def launch_generous(**options: Any) -> zspmd.WorkerGroup:
    return zspmd.launch("support.launched:Generous", world_size=2, preload=(), deadlines=DEADLINES, **options)


async def test_a_mistake_of_the_caller_is_named_and_the_group_lives_on() -> None:
    async with launch_generous(output_ranks="all") as group:
        with pytest.raises(TypeError, match=r"value\['x'\]\[1\]\['y'\] is a builtins.tuple; .* send a list"):
            await group.step({"x": [0, {"y": (1, 2)}]})
        with pytest.raises(TypeError, match=r"value\[1\]\[0\] is a builtins.object; None, bool, int"):
            await group.call("give", object())
        with pytest.raises(ValueError, match=r"value holds 1025 arrays of more than 4096 B; the limit is 1024"):
            await group.step([np.zeros(2000)] * 1025)
        with pytest.raises(ValueError, match=r"value packs to 67108\d+ B; the limit is 67108864: send bulk data as arrays"):
            await group.step(bytes(1 << 26))
        with pytest.raises(WorkerRaisedError, match=r"Generous has no method 'take' marked @zspmd\.rpc; marked are: give"):
            await group.call("take")
        with pytest.raises(TopologyError, match=r"ranks is \[0, 2\]; it must name one or more different ranks from 0 to 1"):
            await group.call("give", "x", ranks=[0, 2])
        with pytest.raises(ConfigError, match="timeout_s is -1; it must be a number of seconds above 0"):
            await group.step("x", timeout_s=-1)
        assert await group.step("still here") == ["still here"] * 2


async def test_answers_are_awaited_once() -> None:
    async with launch_generous() as group:
        pending = await group.submit("x")
        assert await pending == ["x"]
        with pytest.raises(ResultTakenError, match="the answers to step 0 were awaited before; await once and keep the list"):
            await pending
        assert await group.step("still here") == ["still here"]


async def test_a_step_after_the_end_is_refused() -> None:
    async with launch_generous() as group:
        pending = await group.submit("x")
    assert await pending == ["x"]
    with pytest.raises(ClosedError, match=f"group {group.launch_id} is closed; launch a new one"):
        await group.step("x")


async def test_a_call_that_returns_too_much_raises_and_the_group_lives_on() -> None:
    async with launch_generous() as group:
        for what, words in TOO_MUCH.items():
            with pytest.raises(WorkerRaisedError, match=words) as caught:
                await group.call("give", what, ranks=[1])
            assert caught.value.rank == 1
        assert len((await group.call("give", "1024 large arrays", ranks=[1]))[0]) == 1024
        assert await group.step("still here") == ["still here"]


@pytest.mark.parametrize("what", TOO_MUCH)
async def test_a_step_that_returns_too_much_ends_the_group(what: str) -> None:
    async with launch_generous() as group:
        with pytest.raises(WorkerRaisedError, match=TOO_MUCH[what]) as caught:
            await group.step(what)
        assert (caught.value.rank, caught.value.step_id) == (0, 0)
        with pytest.raises(WorkerRaisedError, match=TOO_MUCH[what]):
            await group.step("after it")
