"""Every benchmark that has a target, one after the other, and a verdict for each figure; some minutes.

The targets are those that the project has set itself, for a machine of two cores. Nothing depends on the verdicts: a noisy machine misses
some, and the table of each benchmark has the spread.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from ....errors import ConfigError, LaunchError, TransportError, WorkerError
from . import collective, engine, idle, speculation, start, step, wire
from .engine_cases import BARE, WAYS
from .output import add_output_options, show
from .report import Report
from .rows import Row, Value
from .table import format_value

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

# Each part: its module, and the options with which all parts together take less than ten minutes.
PARTS: dict[str, tuple[ModuleType, str]] = {
    "wire": (wire, "--batch 256 --turns 8"),
    "collective": (collective, "--ranks 2 --size 2K 64K --operation all-reduce"),
    "idle": (idle, "--ranks 1 2 --seconds 10"),
    "step": (step, "--ranks 1 2 4 8 --payload 512 64K --turns 8"),
    "start": (start, "--of program --ranks 2 --turns 3"),
    "engine": (engine, "--tp 1 2 --batch 1 16 --baseline bare transformers --turns 4"),
    "speculation": (speculation, "--turns 8 --threads 1"),
}
AT_MOST, BELOW, AT_LEAST = "<=", "<", ">="


@dataclass(frozen=True)
class Target:
    """What a figure must reach, in every case of a part that has it.

    Attributes:
        part: the benchmark.
        figure: in words.
        side: whose figure it is.
        limit: which the figure has to stay at, below or above, as ``sense`` says.
        against: the side to whose figure this is the ratio; "" for the figure itself.
        fact: the row's further figure that counts, instead of its median; "" for the median.
        where: what a case must have for the target to mean it.
    """

    part: str
    figure: str
    side: str
    sense: str
    limit: float
    against: str = ""
    fact: str = ""
    where: Mapping[str, Value] | None = None

    def is_met_by(self, value: float) -> bool:
        """Say whether a figure reaches it."""
        return value <= self.limit if self.sense == AT_MOST else value < self.limit if self.sense == BELOW else value >= self.limit


_RIVALS = [rival.name for rival in step.RIVALS.values() if rival.program != "pipes"]
_TRIP: Mapping[str, Value] = {"in flight": 1}
_DECODE: Mapping[str, Value] = {"what": "decode"}
TARGETS = (
    Target("step", "round trip to raw pyzmq", step.OURS, AT_MOST, 1.25, against=step.RAW, where=_TRIP),
    *(Target("step", f"round trip to {name}", step.OURS, BELOW, 1.0, against=name, where=_TRIP) for name in _RIVALS),
    Target("step", "steps/s with 4 in flight to one by one", step.OURS, AT_LEAST, 2.0, fact="x trips"),
    Target("collective", "all-reduce, gloo to shm", "gloo", AT_LEAST, 20.0, against="shm", where={"size": "2 KB"}),
    Target("collective", "all-reduce, gloo to shm", "gloo", AT_LEAST, 4.0, against="shm", where={"size": "64 KB"}),
    Target("engine", "tokens/s, tp 1, to the bare loop", "zspmd", AT_LEAST, 0.95, against=BARE, where={**_DECODE, "tp": 1}),
    *(Target("engine", f"tokens/s to {name}", "zspmd", AT_LEAST, 3.0, against=name, where=_DECODE) for name in WAYS.values()),
    Target("speculation", "goodput to the better of off and fixed", "goodput", AT_LEAST, speculation.OF_BETTER, fact=speculation.TO_BETTER),
    Target(
        "speculation", "goodput to off, useless drafts", "goodput", AT_LEAST, speculation.OF_OFF, against="off", where={"acceptance": "low"}
    ),
    Target("start", "zspmd-run generate to the first text, tp 2, s", "zspmd", AT_MOST, 4.0, where={"of": "program"}),
    Target("wire", "bytes of a steady decode step, 16 new blocks", wire.OURS, AT_MOST, 64 + 6 * 16, where={"what": "bytes", "batch": 256}),
    Target("idle", "idle rank, % of a core", "rank", BELOW, 1.0),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check the options."""
    if arguments.plot is not None:
        raise ConfigError("--plot draws one benchmark, and this is several; give it to 'bench step' and the like")
    for name in arguments.part:
        PARTS[name][0].prepare(_part_arguments(name), options)
    return f"{', '.join(arguments.part)}: {sum(target.part in arguments.part for target in TARGETS)} targets"


async def measure(arguments: argparse.Namespace, options: LaunchOptions, report: Report) -> None:
    """Measure the parts, show the table of each, and judge."""
    report.title = "Targets"
    for name in dict.fromkeys(arguments.part):
        part = Report(name, is_quiet=report.is_quiet)
        report.parts.append(part)
        chosen = _part_arguments(name)
        PARTS[name][0].prepare(chosen, options)
        try:
            await PARTS[name][0].measure(chosen, options, part)
        except (LaunchError, TransportError, WorkerError) as error:
            part.note(f"not whole: {error}")
            report.note(f"{name} is not whole: {error}")
        part.finish()
        if part.rows:
            show(part)
        for target in TARGETS:
            if target.part == name:
                _judge(target, part, report)


def _part_arguments(name: str) -> argparse.Namespace:
    """Return the options of a part, as its own command line would give them."""
    module, options = PARTS[name]
    parser = argparse.ArgumentParser(prog=f"zspmd-run bench {name}")
    module.add_arguments(parser)
    add_output_options(parser, getattr(module, "TURNS", None))
    return parser.parse_args(options.split())


def _judge(target: Target, part: Report, report: Report) -> None:
    """Add a row for every case that the target means; one that says so where there is none."""
    rows = list(_judged(target, part))
    if not rows:
        report.note(f"not measured: {target.part}: {target.figure}")
    for row in rows:
        report.add(row)


def _judged(target: Target, part: Report) -> Iterator[Row]:
    for row in part.rows:
        if row.side != target.side or any(row.case.get(name) != value for name, value in (target.where or {}).items()):
            continue
        value, quartiles = _figure(target, row, part)
        if value is None:
            continue
        verdict = "met" if target.is_met_by(value) else "missed"
        facts: dict[str, Value] = {"quartiles of it": quartiles, "target": f"{target.sense} {target.limit:g}", "verdict": verdict}
        case = ", ".join(f"{name} {given}" for name, given in row.case.items())
        yield Row({"figure": target.figure, "case": case}, row.side, "x" if target.against or target.fact else row.unit, [[value]], facts)


def _figure(target: Target, row: Row, part: Report) -> tuple[float | None, str]:
    """Return the figure that counts, and its quartiles where it has any; None where the row has no such figure."""
    if target.fact:
        fact = row.facts.get(target.fact)
        return (float(fact) if isinstance(fact, (int, float)) else None), ""
    if not target.against:
        return row.spread().median, ""
    other = part.find(row.case, target.against, row.unit)
    if other is None:
        return None, ""
    ratio = row.ratio_to(other)
    return ratio.median, f"{format_value(ratio.lower)} to {format_value(ratio.upper)}"
