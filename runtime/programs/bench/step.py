"""Round trip of a step, and steps per second with several in flight; beside raw pyzmq, Ray, torch RPC, gloo and pipes.

A step is a payload that every rank gets and acknowledges. The floor is raw pyzmq in the same pattern: an XPUB, a SUB and a PUSH in each of
as many processes, a PULL, all blocking. Every side has processes of its own, and all take turns. The times of the others depend on what is
installed: Ray (pip install ray), torch's RPC and gloo's object collectives, multiprocessing's pipes.

``driver us`` is the processor time of the driver's thread for a step, ``all us`` that of all threads of both ends, ``wake-ups`` how often
one of these threads went to sleep. With several steps in flight a sample is the time of a turn over its steps; ``x trips`` is how many
times as many steps that makes as one after the other.

``zspmd-run --host HOST:8 bench step`` has the ranks of zspmd and of raw pyzmq on another machine, over TCP with CURVE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ....errors import ConfigError, LaunchError
from .report import Report
from .rivals import Rival
from .rows import Row, TakeTurn, Value, take_turns
from .side_process import SideProcess
from .sides.step_turn import StepRequest
from .sizes import read_size, show_size

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

TURNS = 12
TAKES_HOSTS = True
RANKS = [1, 2, 4, 8]
PAYLOADS = [64, 512, 64 << 10, 1 << 20]
OURS, RAW = "zspmd", "raw pyzmq"
RIVALS = {
    "ray-graph": Rival("Ray compiled graph", "ray_steps", needs="ray", variant="graph"),
    "ray-calls": Rival("Ray actor calls", "ray_steps", needs="ray", variant="calls"),
    "torch-rpc": Rival("torch RPC", "torch_rpc", needs="torch"),
    "gloo": Rival("gloo objects", "gloo_objects", needs="torch"),
    "pipes": Rival("multiprocessing pipes", "pipes"),
}
_SIDES = "zspmd.runtime.programs.bench.sides"
_MAX_RANKS = 256
_MAX_WINDOW = 64
_FACTS = ("driver us", "all us", "wake-ups")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="(1 2 4 8)")
    parser.add_argument("--payload", type=read_size, nargs="+", default=PAYLOADS, metavar="SIZE", help="(64 512 64K 1M)")
    parser.add_argument("--replies", choices=("all", "one"), nargs="+", default=["all"], help="which ranks answer with a value (all)")
    parser.add_argument(
        "--window", type=int, default=4, metavar="N", help="steps in flight where they are not one by one; 1 leaves it out (4)"
    )
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS), metavar="NAME", help=f"({' '.join(RIVALS)})")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), nargs="+", default=["uvloop"], help="the driver's event loops (uvloop)")
    parser.add_argument("--transport", choices=("ipc", "tcp"), nargs="+", default=["ipc"], help="tcp has CURVE, over the loopback (ipc)")
    parser.add_argument(
        "--steps", type=int, default=200, metavar="N", help="of a turn at most, and times --window where they are in flight (200)"
    )
    parser.add_argument("--turn-s", type=float, default=0.25, metavar="S", help="seconds of a turn at most (0.25)")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check the options."""
    arguments.ranks = arguments.ranks or RANKS
    for name, values, limit in (
        ("--ranks", arguments.ranks, _MAX_RANKS),
        ("--window", [arguments.window], _MAX_WINDOW),
        ("--steps", [arguments.steps], 1_000_000),
    ):
        for value in values:
            if not 1 <= value <= limit:
                raise ConfigError(f"{name} is {value}; it must be from 1 to {limit}")
    if not 0 < arguments.turn_s <= 60:
        raise ConfigError(f"--turn-s is {arguments.turn_s:g}; it must be above 0 and at most 60")
    if options.hosts is not None:
        if len(options.hosts) != 1:
            raise ConfigError(f"{len(options.hosts)} hosts are given; bench step takes one, on which all ranks run")
        arguments.transport, arguments.rivals = ["tcp"], []
    sizes = ", ".join(map(show_size, arguments.payload))
    return f"{', '.join(map(str, arguments.ranks))} ranks, payloads of {sizes}, {arguments.turns} turns a side"


async def measure(arguments: argparse.Namespace, options: LaunchOptions, report: Report) -> None:
    """Measure each number of ranks with processes of its own."""
    report.baseline, report.title, report.x_axis = RAW, "Round trip of a step, and steps in flight", "ranks"
    report.others = [rival.needs for name in arguments.rivals if (rival := RIVALS[name]).needs is not None]
    rivals = _installed(arguments.rivals, report)
    for transport, ranks, replies in itertools.product(arguments.transport, arguments.ranks, arguments.replies):
        case: dict[str, Value] = {"ranks": ranks, "replies": replies}
        if arguments.transport != ["ipc"]:
            case = {"transport": transport, **case}
        async with AsyncExitStack() as stack:
            report.say(f"{ranks} ranks over {transport}, {replies} replying: starting")
            sides = await _start_own(stack, arguments, options, transport, ranks, replies)
            if replies == "all" and transport == "ipc":
                sides += await _start_rivals(stack, rivals, ranks, report)
            for payload in arguments.payload:
                report.say(f"{ranks} ranks over {transport}, {show_size(payload)}")
                await _measure_payload({**case, "payload": show_size(payload)}, payload, sides, arguments, report)


@dataclass
class _Side:
    """A side, its process, and what its turns told beside their samples."""

    name: str
    process: SideProcess
    variant: str = ""
    has_window: bool = False
    told: list[dict[str, Any]] = field(default_factory=list)

    def turn(self, request: StepRequest) -> TakeTurn:
        """Return what takes a turn."""

        async def take() -> list[float]:
            told = await self.process.turn({**request.as_json(), "variant": self.variant})
            self.told.append(told)
            return list(told["times_us"])

        return take

    def facts(self) -> dict[str, Value]:
        """Return the medians of what its turns told since the last call."""
        told, self.told = self.told, []
        return {name: statistics.median(turn[name] for turn in told) for name in _FACTS if name in told[0]}


async def _measure_payload(case: dict[str, Value], payload: int, sides: list[_Side], arguments: argparse.Namespace, report: Report) -> None:
    trip = StepRequest(payload, arguments.steps, arguments.turn_s)
    one_by_one = {**case, "in flight": 1}
    for side in sides:
        await side.turn(StepRequest(payload, min(20, arguments.steps), arguments.turn_s))()  # what the first of a size allocates
        side.told.clear()
    for side, turns in (await take_turns({side.name: side.turn(trip) for side in sides}, arguments.turns)).items():
        report.add(Row(one_by_one, side, "us", turns, _named(sides, side).facts()))
    if arguments.window == 1:
        return
    request = StepRequest(payload, arguments.steps * arguments.window, arguments.turn_s, arguments.window)
    piped = {**case, "in flight": arguments.window}
    for name, turns in (await take_turns({s.name: s.turn(request) for s in sides if s.has_window}, arguments.turns)).items():
        row = Row(piped, name, "us", turns, _named(sides, name).facts())
        alone = report.find(one_by_one, name, "us")
        row.facts["x trips"] = alone.spread().median / row.spread().median if alone is not None else ""
        report.add(row)


def _named(sides: list[_Side], name: str) -> _Side:
    return next(side for side in sides if side.name == name)


async def _start_own(
    stack: AsyncExitStack, arguments: argparse.Namespace, options: LaunchOptions, transport: str, ranks: int, replies: str
) -> list[_Side]:
    """Start the group, or one for each loop, and raw pyzmq."""
    common = ["--ranks", str(ranks), "--replies", replies, *_place(options)]
    sides, address = [], None
    for loop in arguments.loop:
        name = OURS if loop == "uvloop" else f"{OURS}, {loop}"
        argv = ["-m", f"{_SIDES}.group_side", *common, "--transport", transport, "--loop", loop, "--window", str(max(arguments.window, 1))]
        process = await stack.enter_async_context(SideProcess(name, argv))
        address = process.facts["address"]
        sides.append(_Side(name, process, has_window=True))
    argv = ["-m", f"{_SIDES}.raw_side", *common, *(("--address", address) if address is not None else ())]
    sides.append(_Side(RAW, await stack.enter_async_context(SideProcess(RAW, argv)), has_window=True))
    return sides


def _place(options: LaunchOptions) -> list[str]:
    if options.hosts is None:
        return []
    return ["--place", json.dumps({"host": asdict(options.hosts[0]), "nodes": asdict(options.nodes)})]


def _installed(names: list[str], report: Report) -> list[Rival]:
    """Return the rivals that can be measured here; the report tells why the others cannot."""
    rivals = []
    for rival in (RIVALS[name] for name in dict.fromkeys(names)):
        if why := rival.why_not():
            report.note(f"left out: {why}")
        else:
            rivals.append(rival)
    return rivals


async def _start_rivals(stack: AsyncExitStack, rivals: list[Rival], ranks: int, report: Report) -> list[_Side]:
    """Start those that start, one process for those that share a program."""
    started: dict[str, SideProcess | None] = {}
    sides = []
    for rival in rivals:
        if rival.program not in started:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="zbench", ignore_cleanup_errors=True))
            side = SideProcess(rival.name, rival.argv(ranks, directory))
            try:
                started[rival.program] = await stack.enter_async_context(side)
            except LaunchError as error:
                started[rival.program] = None
                report.note(f"left out with {ranks} ranks: {error}")
        process = started[rival.program]
        if process is not None:
            sides.append(_Side(rival.name, process, rival.variant))
    return sides
