"""Processor time of a ready group that does nothing, per rank, of the driver, and of what supervises them.

The group is that of an empty worker; ``--preload torch`` adds what a rank with a model has in memory. A figure is the share of one core.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from typing import TYPE_CHECKING

import psutil

from ....errors import ConfigError
from ...driver.launching import launch
from .meter import Meter
from .report import Report
from .rows import Row

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

TURNS = 5
RANKS = [1, 2, 4]
_WORKER = "zspmd.runtime.programs.bench.sides.workers:Acknowledger"
_UNIT = "% of a core"
_SETTLE_S = 1.0
_MAX_RANKS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="(1 2 4)")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="for each number of ranks, over all turns (10)")
    parser.add_argument("--preload", nargs="*", default=[], metavar="MODULE", help="imported before the ranks are forked, such as torch")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check the options."""
    arguments.ranks = arguments.ranks or RANKS
    for ranks in arguments.ranks:
        if not 1 <= ranks <= _MAX_RANKS:
            raise ConfigError(f"--ranks is {ranks}; it must be from 1 to {_MAX_RANKS}")
    if not 0 < arguments.seconds <= 3600:
        raise ConfigError(f"--seconds is {arguments.seconds:g}; it must be above 0 and at most 3600")
    return f"{', '.join(map(str, arguments.ranks))} ranks, {arguments.seconds:g} s each"


async def measure(arguments: argparse.Namespace, options: LaunchOptions, report: Report) -> None:
    """Start each group, let it be, and read the kernel's counters."""
    report.title, report.x_axis = "An idle ready group", "ranks"
    for ranks in arguments.ranks:
        report.say(f"{ranks} ranks for {arguments.seconds:g} s")
        before = _descendants()
        async with launch(_WORKER, world_size=ranks, devices="cpu", preload=arguments.preload) as group:
            await asyncio.sleep(_SETTLE_S)
            rank_pids = [rank.pid for rank in group.health() if rank.pid is not None]
            others = sorted(_descendants() - before - set(rank_pids))
            meters = {"rank": [Meter([pid]) for pid in rank_pids], "driver": [Meter([os.getpid()])], "supervision": [Meter(others)]}
            rows = {side: Row({"ranks": ranks}, side, _UNIT) for side in meters}
            for _ in range(arguments.turns):
                for side, shares in (await _watch(meters, arguments.seconds / arguments.turns)).items():
                    rows[side].turns.append(shares)
        rows["rank"].facts["must stay below"] = 1
        for row in rows.values():
            report.add(row)


async def _watch(meters: dict[str, list[Meter]], seconds: float) -> dict[str, list[float]]:
    """Return by side what share of a core each of its meters has counted, in percent."""
    began_s, before = time.perf_counter(), {side: [meter.read()[0] for meter in each] for side, each in meters.items()}
    await asyncio.sleep(seconds)
    elapsed_us = (time.perf_counter() - began_s) * 1e6
    return {
        side: [(meter.read()[0] - spent) / elapsed_us * 100 for meter, spent in zip(each, before[side])] for side, each in meters.items()
    }


def _descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}
