"""What a step costs the driver with 8 to 1,024 ranks, directly and through one relay per node, and what that says for 10,000.

The ranks are simulated: sockets with keys of their own, many in one process, that take every step over TCP with CURVE and compute nothing.
So a step's duration means little where they share the driver's cores; the figure is the processor time of the driver's process, its
encryption included. ``publish`` has one acknowledgement for each process of simulated ranks; ``all`` one from every rank, which a worker
group has for its credit window. The curve is a straight line through the medians, ``a + b * ranks``, each weighted by its own size.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from ....errors import ConfigError
from .report import Report
from .rows import Row, TakeTurn, Value, take_turns
from .side_process import SideProcess
from .sizes import read_size, show_size

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

TURNS = 7
RANKS = [8, 32, 128, 512, 1024]
DIRECT, RELAYED = "direct", "relayed"
ACKNOWLEDGED = {"publish": False, "all": True}
FAR = 10_000  # the ranks that the curve is drawn out to
_MAX_RANKS = 4096
_FACTS = ("its thread us", "publish us", "step us")
_MIN_POINTS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help=f"({' '.join(map(str, RANKS))})")
    parser.add_argument("--per-node", type=int, default=8, metavar="N", help="ranks of a node (8)")
    parser.add_argument("--payload", type=read_size, default=512, metavar="SIZE", help="(512)")
    parser.add_argument("--answers", choices=ACKNOWLEDGED, nargs="+", default=list(ACKNOWLEDGED), help="(both)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="of a turn at most (200)")
    parser.add_argument("--turn-s", type=float, default=0.25, metavar="S", help="seconds of a turn, as soon as it has a step (0.25)")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check the options."""
    arguments.ranks = arguments.ranks or RANKS
    for name, values, limit in (("--ranks", arguments.ranks, _MAX_RANKS), ("--per-node", [arguments.per_node], 256)):
        for value in values:
            if not 1 <= value <= limit:
                raise ConfigError(f"{name} is {value}; it must be from 1 to {limit}")
    if arguments.steps < 1 or not 0 < arguments.turn_s <= 60:
        raise ConfigError(
            f"--steps is {arguments.steps} and --turn-s {arguments.turn_s:g}; they must be at least 1, and above 0 and at most 60"
        )
    return f"{', '.join(map(str, arguments.ranks))} ranks, {arguments.per_node} a node"


async def measure(arguments: argparse.Namespace, options: LaunchOptions, report: Report) -> None:
    """Measure each number of ranks, both ways in turns, then fit the curves."""
    report.baseline, report.title, report.x_axis = DIRECT, "Processor time of the driver for a step", "ranks"
    for ranks in arguments.ranks:
        report.say(f"{ranks} ranks: starting")
        async with AsyncExitStack() as stack:
            sides = {}
            for name in (DIRECT, RELAYED):
                argv = ["-m", "zspmd.runtime.programs.bench.sides.scale_side", "--ranks", str(ranks), "--per-node", str(arguments.per_node)]
                side = SideProcess(f"{name}, {ranks} ranks", [*argv, *(["--relayed"] if name == RELAYED else [])])
                sides[name] = await stack.enter_async_context(side)
            for answers in arguments.answers:
                report.say(f"{ranks} ranks, answers: {answers}")
                await _measure_case(ranks, answers, sides, arguments, report)
    _fit(arguments, report)


async def _measure_case(ranks: int, answers: str, sides: dict[str, SideProcess], arguments: argparse.Namespace, report: Report) -> None:
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    request = {
        "payload": arguments.payload,
        "is_acknowledged": ACKNOWLEDGED[answers],
        "steps": arguments.steps,
        "limit_s": arguments.turn_s,
    }

    def turn_of(name: str) -> TakeTurn:
        async def take() -> list[float]:
            told[name].append(await sides[name].turn(request))
            return [told[name][-1]["driver us"]]

        return take

    case: dict[str, Value] = {"answers": answers, "payload": show_size(arguments.payload), "ranks": ranks}
    for name, turns in (await take_turns({name: turn_of(name) for name in sides}, arguments.turns)).items():
        facts: dict[str, Value] = {fact: statistics.median(turn[fact] for turn in told[name]) for fact in _FACTS}
        report.add(Row(case, name, "us", turns, {**facts, "us a rank": Row(case, name, "us", turns).spread().median / ranks}))


def _fit(arguments: argparse.Namespace, report: Report) -> None:
    """Note what a straight line through the medians says for many more ranks."""
    for answers in arguments.answers:
        for name in (DIRECT, RELAYED):
            points = [
                (row.case["ranks"], row.spread().median) for row in report.rows if row.side == name and row.case["answers"] == answers
            ]
            if len(points) < _MIN_POINTS:
                report.note("no curve: it needs three numbers of ranks or more")
                return
            fixed_us, each_us, error = fit_line([float(ranks) for ranks, _ in points], [cost for _, cost in points])
            far_ms = (fixed_us + each_us * FAR) / 1000
            line = f"{fixed_us:.0f} us + {each_us:.2f} us a rank (off by up to {error:.0%})"
            through = f"{points[0][0]} to {points[-1][0]} ranks"
            report.note(
                f"answers {answers}, {name}: a fit through {through}, {line}, would be {far_ms:.1f} ms a step for {FAR:,} ranks; "
                "drawn out, not measured"
            )


def fit_line(xs: list[float], ys: list[float]) -> tuple[float, float, float]:
    """Return offset, slope and the largest relative error of a line through points above 0, each weighted by its own size."""
    slope, offset = np.polyfit(xs, ys, 1, w=1 / np.asarray(ys))
    error = max(abs(offset + slope * x - y) / y for x, y in zip(xs, ys))
    return float(offset), float(slope), float(error)
