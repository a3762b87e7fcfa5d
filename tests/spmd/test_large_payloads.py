"""A quarter of a gigabyte in a step and in a reply, and what it costs in memory on both sides."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from support.groups import DEADLINES, launch
from support.memory import peak_bytes, reset_peak

import zspmd

pytestmark = pytest.mark.usefixtures("leak_check")
SIZE = 256 << 20
MARGIN = 24 << 20  # of interpreter, allocator and whatever else moves meanwhile
NUM_RANKS = 2


async def test_a_large_step_is_copied_once_on_each_rank_and_never_on_the_driver() -> None:
    array = np.arange(SIZE // 8, dtype=np.int64)
    async with launch("Memory", NUM_RANKS) as group:
        before = reset_peak()
        answers = await group.step({"x": array})
        assert peak_bytes() - before < MARGIN
        for answer in answers:
            assert answer["sum"] == int(array.sum())
            assert SIZE <= answer["peak_growth"] < SIZE + MARGIN


async def test_a_large_answer_is_copied_once_on_the_driver_and_never_on_the_rank() -> None:
    async with launch("Memory", NUM_RANKS, output_ranks=(1,)) as group:
        await group.call("prepare", SIZE, ranks=[1])
        before = reset_peak()
        (answer,) = await group.call("large", ranks=[1])
        assert SIZE - MARGIN < peak_bytes() - before < SIZE + MARGIN
        assert answer["x"].nbytes == SIZE
        assert int(answer["x"].sum()) == answer["sum"]
        (growth,) = await group.call("peak_growth", ranks=[1])
        assert growth < MARGIN


async def test_a_rank_that_stands_still_costs_the_driver_its_window_and_no_more() -> None:
    window, size = 3, 32 << 20
    async with launch("Memory", 1, window=window, deadlines=replace(DEADLINES, step_s=2.0)) as group:
        pid = group.health()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            before = reset_peak()
            for _ in range(window):
                await group.submit({"x": np.ones(size // 8)}, timeout_s=60)
            with pytest.raises(zspmd.BackpressureError, match=rf"no room in the window of {window} frames .* rank 0 has not"):
                await group.submit({"x": np.ones(size // 8)})
            assert peak_bytes() - before < (window + 1) * size + MARGIN
            assert group.statistics().in_flight == window
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (await group.call("peak_growth"))[0] < (window + 1) * size + MARGIN
        assert group.statistics().in_flight == 0
