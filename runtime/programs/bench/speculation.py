"""Whether the goodput policy is as fast as the better of no drafts and always as many: a matrix of batches and of good and bad drafts.

The demo model says the lines that it knows, each stream one after another. Acceptance is high with its own draft model, and next to zero
with a draft of the same size and random weights. In each case engines without drafts, with always as many and with the policy take turns.
Some engines are a little slower than others of their kind for as long as they live (memory, cores), so that there are several of each kind.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ....config import DTYPES, EngineConfig
from ....errors import ConfigError
from ....model_config import read_model_config
from ....speculation_config import DraftConfig, SpeculationConfig
from ...engine.checkpoint import DEMO_MODEL
from ...engine.draft_checkpoint import DEMO_DRAFT
from .engine_speculation import SpeculatingEngines, describe_case, report_turns, take_speculating_turns
from .report import Report
from .rows import Row
from .speculating_side import SpeculatingTurn
from .speculation_prompts import SpeculationPrompts
from .table import format_value
from .useless_draft import write_useless_draft

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

TURNS = 4
TAKES_AXES = ("tp",)
OFF, FIXED, GOODPUT = "off", "fixed", "goodput"
HIGH, LOW = "high", "low"
TO_BETTER = "to better"
# What goodput must reach: of the better of the two, and, where drafts are useless, of none.
OF_BETTER, OF_OFF = 0.9, 0.95
_MAX_COUNT = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="streams of a turn (1 8 32)")
    parser.add_argument("--acceptance", nargs="+", choices=(HIGH, LOW), default=[HIGH, LOW], help="(high low)")
    parser.add_argument("--k", type=int, default=4, metavar="N", help="drafts of a sequence in a step, at most (4)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="lines of each stream of a turn (4)")
    parser.add_argument("--engines", type=int, default=3, metavar="N", help="of each kind, one after another, for --turns turns each (3)")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights and activations (auto)")
    parser.add_argument("--threads", type=int, metavar="N", help="OMP_NUM_THREADS of a rank, as a launch chooses")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check the options."""
    for option in ("batch", "rounds", "engines", "threads"):
        given = getattr(arguments, option)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and not 1 <= value <= _MAX_COUNT:
                raise ConfigError(f"--{option} is {value}; it must be from 1 to {_MAX_COUNT}")
    DraftConfig("demo", k=arguments.k)
    sizes = f"batch {', '.join(map(str, arguments.batch))}, acceptance {', '.join(arguments.acceptance)}"
    return f"demo, tp {options.parallel.tp}, {sizes}, {arguments.engines} times {arguments.turns} turns"


async def measure(arguments: argparse.Namespace, options: LaunchOptions, report: Report) -> None:
    """Measure each case in turns."""
    report.title, report.baseline, report.others = "Policies of speculation", OFF, ("torch",)
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # which launches pass on
    prompts = SpeculationPrompts("lines", 0, 0, read_model_config(DEMO_MODEL).vocab_size)
    engines = SpeculatingEngines(
        model=DEMO_MODEL,
        tp=options.parallel.tp,
        batch=max(arguments.batch),
        num_positions=prompts.num_positions,
        dtype=arguments.dtype,
        window=EngineConfig().window,
        placement=options.device_spec,
        log_dir=options.log_dir,
    )
    with tempfile.TemporaryDirectory(prefix="zspmd-bench-") as scratch:
        for acceptance in dict.fromkeys(arguments.acceptance):
            draft = DEMO_DRAFT if acceptance == HIGH else write_useless_draft(Path(scratch) / "draft", DEMO_DRAFT)
            proposer = DraftConfig(str(draft), k=arguments.k)
            policies = {OFF: None} | {policy: SpeculationConfig(proposer, policy=policy) for policy in (FIXED, GOODPUT)}
            turns: dict[int, dict[str, list[SpeculatingTurn]]] = {batch: {name: [] for name in policies} for batch in arguments.batch}
            for number in range(arguments.engines):
                report.say(f"acceptance {acceptance}, engines {number + 1} of {arguments.engines}")
                async with AsyncExitStack() as stack:
                    sides = await engines.start(stack, policies)
                    for batch in turns:
                        taken = await take_speculating_turns(sides, prompts, batch, arguments.rounds, arguments.turns)
                        for name, of_side in taken.items():
                            turns[batch][name] += of_side
            for batch, of_batch in turns.items():
                judge(report, report_turns(report, {"acceptance": acceptance, "batch": batch}, of_batch))


def judge(report: Report, rows: dict[str, Row]) -> None:
    """Add to the policy's row how it compares with the better of the others, and to the report whether that is what it must reach."""
    off, fixed, goodput = rows[OFF], rows[FIXED], rows[GOODPUT]
    better = max(off, fixed, key=lambda row: row.spread().median)
    of_better, of_off = goodput.ratio_to(better), goodput.ratio_to(off)
    goodput.facts[TO_BETTER] = of_better.median
    is_met = of_better.median >= OF_BETTER
    aims = f"{format_value(of_better.median)} of {better.side}, the better (aim {OF_BETTER:g})"
    if goodput.case["acceptance"] == LOW:
        is_met = is_met and of_off.median >= OF_OFF
        aims += f", {format_value(of_off.median)} of none (aim {OF_OFF:g})"
    report.note(f"{describe_case(goodput.case)}: {'met' if is_met else 'missed'}: goodput has {aims}")
