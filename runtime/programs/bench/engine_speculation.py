"""``bench engine --speculate``: an engine that speculates beside the same engine without, in turns."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ....config import EngineConfig, ParallelConfig
from ....errors import ConfigError
from ....model_config import read_model_config
from ....speculation_config import SpeculationConfig
from ...engine.checkpoint import DEMO_MODEL
from ...engine.engine import Engine
from .engine_cases import BLOCK_SIZE, freeze_garbage
from .report import Report
from .rows import Row, Value
from .speculating_side import SpeculatingSide, SpeculatingTurn, check_same_tokens, make_row
from .speculation_prompts import KINDS, TEXTS, SpeculationPrompts

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

PLAIN, SPECULATING = "plain", "speculating"
_NUM_WARM_TURNS = 2
_SPARE_BLOCKS = 3  # of a sequence, for drafts of steps in flight


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is generated with ``--speculate``."""
    parser.add_argument(
        "--prompts",
        nargs="+",
        choices=KINDS,
        help="with --speculate: what is continued; texts are for the demo model (lines sums edits for it, random for others)",
    )
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="with --speculate: prompts of each stream of a turn (4)")


def choose_prompts(arguments: argparse.Namespace) -> list[str]:
    """Return the kinds of prompts that the options ask for.

    Raises:
        ConfigError: texts for a model that does not know them.
    """
    is_demo = arguments.preset == "demo" or (arguments.model is not None and Path(arguments.model).expanduser().resolve() == DEMO_MODEL)
    kinds = list(dict.fromkeys(arguments.prompts or (TEXTS if is_demo else ("random",))))
    if not is_demo and set(kinds) & set(TEXTS):
        raise ConfigError(f"--prompts {' '.join(kinds)} has texts that only the demo model knows; add --preset demo, or take random")
    return kinds


@dataclass(frozen=True)
class SpeculatingEngines:
    """The engines of a benchmark of speculation, which differ in nothing else.

    Args:
        model: a checkpoint's directory.
        batch: streams of a turn at most.
        num_positions: of the longest sequence.
        placement: devices of the ranks, as ``Engine`` takes them.
    """

    model: Path
    tp: int
    batch: int
    num_positions: int
    dtype: str
    window: int
    placement: str | Sequence[str]
    log_dir: str | None

    def build(self, speculation: SpeculationConfig | None) -> Engine:
        """Return one of them, not started."""
        num_drafts = 0 if speculation is None else speculation.k
        config = EngineConfig(
            max_num_seqs=self.batch,
            max_num_batched_tokens=max(EngineConfig().max_num_batched_tokens, self.batch * (1 + num_drafts)),
            max_model_len=self.num_positions,
            block_size=BLOCK_SIZE,
            num_blocks=self.batch * (-(-self.num_positions // BLOCK_SIZE) + _SPARE_BLOCKS) + 1,
            dtype=self.dtype,
            window=self.window,
            speculation=speculation,
        )
        return Engine(self.model, parallel=ParallelConfig(tp=self.tp), config=config, devices=self.placement, log_dir=self.log_dir)

    async def start(self, stack: AsyncExitStack, speculations: Mapping[str, SpeculationConfig | None]) -> dict[str, SpeculatingSide]:
        """Start an engine for each side; ``stack`` ends them."""
        return {name: SpeculatingSide(await stack.enter_async_context(self.build(each))) for name, each in speculations.items()}


async def measure_speculation(
    arguments: argparse.Namespace, options: LaunchOptions, report: Report, model: Path, speculation: SpeculationConfig
) -> None:
    """Have a plain engine and one that speculates answer the same prompts, in turns, for each tp, kind of prompts and batch."""
    report.title, report.baseline = "Tokens through the engine, speculating", PLAIN
    vocab_size = read_model_config(model).vocab_size
    kinds = [SpeculationPrompts(kind, arguments.prompt_tokens, arguments.output_tokens, vocab_size) for kind in choose_prompts(arguments)]
    engines = SpeculatingEngines(
        model=model,
        tp=1,
        batch=max(arguments.batch),
        num_positions=max(prompts.num_positions for prompts in kinds),
        dtype=arguments.dtype,
        window=arguments.window,
        placement=options.device_spec,
        log_dir=options.log_dir,
    )
    for tp in arguments.tp:
        async with AsyncExitStack() as stack:
            sides = await replace(engines, tp=tp).start(stack, {PLAIN: None, SPECULATING: speculation})
            for prompts in kinds:
                for batch in arguments.batch:
                    case: dict[str, Value] = {"tp": tp, "prompts": prompts.kind, "batch": batch}
                    report.say(describe_case(case))
                    turns = await take_speculating_turns(sides, prompts, batch, arguments.rounds, arguments.turns)
                    rows = report_turns(report, case, turns)
                    ratio = rows[SPECULATING].ratio_to(rows[PLAIN])
                    fewer = float(rows[PLAIN].facts["steps"]) / float(rows[SPECULATING].facts["steps"])
                    report.note(f"{describe_case(case)}: {ratio.median:.2f} times as fast as plain, {fewer:.2f} times fewer target steps")


async def take_speculating_turns(
    sides: dict[str, SpeculatingSide], prompts: SpeculationPrompts, batch: int, num_rounds: int, num_turns: int
) -> dict[str, list[SpeculatingTurn]]:
    """Have the sides answer the same prompts in turns, in alternating order, after some to warm up; returns the turns of each."""
    turns: dict[str, list[SpeculatingTurn]] = {name: [] for name in sides}
    for number in range(_NUM_WARM_TURNS + num_turns):
        drawn = prompts.draw(number, batch * num_rounds)
        streams = [drawn[stream::batch] for stream in range(batch)]
        for name in sides if number % 2 == 0 else reversed(sides):
            turns[name].append(await sides[name].take_turn(streams, prompts.params))
        if number == _NUM_WARM_TURNS - 1:
            freeze_garbage()
    return {name: of_side[_NUM_WARM_TURNS:] for name, of_side in turns.items()}


def report_turns(report: Report, case: dict[str, Value], turns: Mapping[str, Sequence[SpeculatingTurn]]) -> dict[str, Row]:
    """Add a row for each side and return them by name; a note says so if the sides' answers differ."""
    num_other = check_same_tokens(turns)
    if num_other:
        report.note(f"{describe_case(case)}: {num_other} answers are not the same on all sides")
    rows = {name: make_row(case, name, of_side) for name, of_side in turns.items()}
    for row in rows.values():
        report.add(row)
    return rows


def describe_case(case: Mapping[str, Value]) -> str:
    """Return a case as a phrase."""
    return ", ".join(f"{name} {value}" for name, value in case.items())
