"""Arrays that a step sends: whose they are, and until when."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
from support.groups import launch
from support.losing import LOSE
from support.polling import wait_until

import zspmd

pytestmark = pytest.mark.usefixtures("leak_check")
SIZES = pytest.mark.parametrize("size_bytes", [100_000, 2_000_000], ids=["copied", "sent from where it lies"])


@SIZES
async def test_an_array_is_the_callers_again_once_the_answer_is_there_although_a_rank_has_lost_it(
    size_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOSE, "1:1-1x1")
    async with launch("Firsts", 2, output_ranks=[0], preload=("support.losing",)) as group:
        array = np.zeros(size_bytes, np.uint8)
        await group.step(array)
        array[:] = 1
        assert await group.call("firsts") == [[0], [0]]


async def test_a_small_array_is_the_callers_again_once_it_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOSE, "1:1-1x1")
    async with launch("Firsts", 2, preload=("support.losing",)) as group:
        array = np.zeros(100_000, np.uint8)
        pending = await group.submit(array)
        array[:] = 1
        await pending
        assert await group.call("firsts") == [[0], [0]]


async def test_an_answer_waits_until_a_rank_that_does_not_give_one_has_the_array() -> None:
    """Rank 1 is stopped, so that what is sent to it stays in the driver's memory."""
    async with launch("Firsts", 2, output_ranks=[0]) as group:
        pid = group.health()[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            array = np.zeros(2_000_000, np.uint8)
            with pytest.raises(zspmd.WorkerStalledError) as caught:
                await group.step(array, timeout_s=0.5)
            assert caught.value.missing == (1,)
        finally:
            os.kill(pid, signal.SIGCONT)
        await group.step(np.ones(2_000_000, np.uint8))
        assert await group.call("firsts") == [[0, 1], [0, 1]]


async def test_arrays_are_let_go_of_when_the_group_closes(tmp_path: Path) -> None:
    group = launch("Gate", 1, window=2)
    async with group:
        array = np.zeros(1_000_000, np.uint8)
        watched = weakref.ref(array)
        with pytest.raises(zspmd.WorkerStalledError):
            await group.step({"path": str(tmp_path / "gate"), "ranks": [0], "x": array}, timeout_s=0.2)
        del array
        assert watched() is not None
        (tmp_path / "gate").touch()
    gc.collect()
    await wait_until(lambda: watched() is None)  # ZeroMQ lets go of it in a thread
    assert group.statistics().steps == 1


async def test_arrays_are_let_go_of_when_the_group_fails() -> None:
    group = launch("Troubled", 1)
    array = np.zeros(1_000_000, np.uint8)
    watched = weakref.ref(array)
    with pytest.raises(zspmd.WorkerRaisedError):
        async with group:
            await group.step({0: "raise", "x": array})
    assert isinstance(group.fault, zspmd.WorkerRaisedError)
    group.fault.with_traceback(None)  # the traceback holds what the caller's frames hold
    del array
    gc.collect()
    await wait_until(lambda: watched() is None)
