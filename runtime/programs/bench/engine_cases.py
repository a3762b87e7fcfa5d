"""The cases of ``bench engine``: an engine of one size, those that take turns with it, and the rows that come of their turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from ....config import EngineConfig, ParallelConfig
from ....errors import InternalError
from ...engine.engine import Engine
from .engine_side import RankWatch, poisson_arrivals, run_arrivals
from .generation import Turn, Workload
from .report import Report
from .rivals import Rival
from .rows import Row, Value
from .side_process import SideProcess

OURS, BARE = "zspmd", "bare loop"
WAYS = {"generate": "Transformers generate", "continuous": "Transformers continuous"}
BLOCK_SIZE = 16
_BARE_MODULE = "zspmd.runtime.programs.bench.bare_loop"
_NUM_WARM_TURNS = 2
_TURN_S = 300.0

TakeTurn = Callable[[list[list[int]], int], Awaitable[Turn]]
Figure = tuple[str, Callable[[Turn], list[float]]]
"""The unit of a figure, and its samples in a turn."""


@dataclass(frozen=True)
class Settings:
    """What all cases of a run have in common.

    Args:
        model: a checkpoint's directory.
        rivals: who takes turns with the engine: "bare", "transformers".
        placement: devices of the ranks, as ``Engine`` takes them.
    """

    model: Path
    vocab_size: int
    num_prompt: int
    num_output: int
    num_turns: int
    dtype: str
    window: int
    rivals: Sequence[str]
    placement: str | Sequence[str]
    log_dir: str | None

    @property
    def num_positions(self) -> int:
        return self.num_prompt + self.num_output

    def engine_config(self, num_running: int) -> EngineConfig:
        """Return room for so many prompts at once, and a block to spare for each, without which the scheduler admits none."""
        blocks_each = -(-self.num_positions // BLOCK_SIZE) + 1
        return EngineConfig(
            max_num_seqs=num_running,
            max_num_batched_tokens=max(EngineConfig().max_num_batched_tokens, num_running),
            max_model_len=self.num_positions,
            block_size=BLOCK_SIZE,
            num_blocks=num_running * blocks_each + 1,
            dtype=self.dtype,
            window=self.window,
        )

    def engine(self, tp: int, num_running: int) -> Engine:
        """Return an engine for a case, not started."""
        config = self.engine_config(num_running)
        return Engine(self.model, parallel=ParallelConfig(tp=tp), config=config, devices=self.placement, log_dir=self.log_dir)

    def workload(self, batch: int) -> Workload:
        return Workload(batch, self.num_prompt, self.num_output, self.vocab_size)


class EngineSide:
    """The engine's turns, with what the driver's thread and the ranks did meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._watch = RankWatch(engine.group.statistics())
        self._idle: list[float] = []
        self._driver_us: list[float] = []

    async def take_turn(self, prompts: list[list[int]], num_output: int) -> Turn:
        """Run one turn."""
        steps, began_s = self._engine.group.statistics().steps, time.thread_time()
        self._watch.begin()
        turn = await run_arrivals(self._engine, prompts, num_output, [0.0] * len(prompts))
        elapsed_s = time.thread_time() - began_s
        self._driver_us.append(elapsed_s * 1e6 / (self._engine.group.statistics().steps - steps))
        self._idle.append(self._watch.times.idle_share())
        return turn

    def facts(self) -> dict[str, Value]:
        """Return the medians over the turns behind those that warmed up."""
        idle, driver_us = self._idle[_NUM_WARM_TURNS:], self._driver_us[_NUM_WARM_TURNS:]
        return {"rank idle %": 100 * statistics.median(idle), "driver us/step": statistics.median(driver_us)}


async def measure_turns(settings: Settings, report: Report, tp: int, batch: int) -> None:
    """Have an engine and its rivals generate for the same prompts, in turns."""
    case: dict[str, Value] = {"tp": tp, "batch": batch}
    async with AsyncExitStack() as stack:
        engine = await _start(settings.engine(tp, batch), stack, report, case)
        threads = tp * int(engine.group.plan.rank_environment(0)["OMP_NUM_THREADS"])
        ours = EngineSide(engine)
        sides: dict[str, TakeTurn] = {OURS: ours.take_turn}
        for name, process in await _start_rivals(settings, stack, report, batch, threads):
            sides[name] = _turns_of(process)
        turns: dict[str, list[Turn]] = {name: [] for name in sides}
        work = settings.workload(batch)
        for number in range(_NUM_WARM_TURNS + settings.num_turns):
            prompts = work.prompts(number)
            for name in sides if number % 2 == 0 else reversed(sides):
                turns[name].append(await sides[name](prompts, settings.num_output))
            if number == _NUM_WARM_TURNS - 1:
                freeze_garbage()
    _compare_tokens(report, case, turns)
    facts = {name: {"threads": threads} | (ours.facts() if name == OURS else {}) for name in sides}
    _add_rows(report, case, _RATES | _TIMES, {name: each[_NUM_WARM_TURNS:] for name, each in turns.items()}, facts)


async def measure_rates(settings: Settings, report: Report, tp: int, rates: Sequence[float], num_requests: int) -> None:
    """Have prompts come to an engine at each of some rates, one by one."""
    async with AsyncExitStack() as stack:
        engine = settings.engine(tp, min(num_requests, EngineConfig().max_num_seqs))
        await _start(engine, stack, report, {"tp": tp})
        work, number = settings.workload(num_requests), 0
        await run_arrivals(engine, settings.workload(1).prompts(number), settings.num_output, [0.0])
        freeze_garbage()
        for rate in rates:
            turns = []
            for _ in range(settings.num_turns):
                number += 1
                arrivals = poisson_arrivals(num_requests, rate, number)
                turns.append(await run_arrivals(engine, work.prompts(number), settings.num_output, arrivals))
            _add_rows(report, {"tp": tp, "prompts/s": rate}, _TIMES, {OURS: turns}, {OURS: {}})


def freeze_garbage() -> None:
    """Keep the garbage collector from what is alive by now."""
    gc.collect()
    gc.freeze()


async def _start(engine: Engine, stack: AsyncExitStack, report: Report, case: Mapping[str, Value]) -> Engine:
    report.say(", ".join(f"{name} {value}" for name, value in case.items()))
    began_s = time.perf_counter()
    await stack.enter_async_context(engine)
    report.add(Row({**case, "what": "ready"}, OURS, "s", [[time.perf_counter() - began_s]]))
    return engine


async def _start_rivals(
    settings: Settings, stack: AsyncExitStack, report: Report, batch: int, threads: int
) -> list[tuple[str, SideProcess]]:
    """Start those that can be measured here; each has as many threads as the ranks have together."""
    arguments = [str(settings.model), str(batch), str(settings.num_positions), settings.dtype]
    programs: list[tuple[str, Sequence[str]]] = []
    if "bare" in settings.rivals:
        programs.append((BARE, ("-m", _BARE_MODULE, *arguments)))
    for way, name in WAYS.items() if "transformers" in settings.rivals else ():
        rival = Rival(name, "transformers_generation", needs="transformers")
        if why := rival.why_not():
            report.note(f"left out: {why}")
        else:
            programs.append((name, rival.argv(way, *arguments)))
    variables = {"OMP_NUM_THREADS": str(threads)}
    return [(name, await stack.enter_async_context(SideProcess(name, argv, variables=variables))) for name, argv in programs]


def _turns_of(process: SideProcess) -> TakeTurn:
    async def take_turn(prompts: list[list[int]], num_output: int) -> Turn:
        return Turn.from_json(await process.turn({"prompts": prompts, "num_output": num_output}, timeout_s=_TURN_S))

    return take_turn


def _compare_tokens(report: Report, case: Mapping[str, Value], turns: Mapping[str, Sequence[Turn]]) -> None:
    """Say whose tokens differ from the engine's; sides that compute in another order may round another way.

    Raises:
        InternalError: a side has generated fewer or more tokens, so that the figures mean nothing.
    """
    ours = [tokens for turn in turns[OURS] for tokens in turn.token_ids]
    for name, theirs in ((name, [tokens for turn in each for tokens in turn.token_ids]) for name, each in turns.items()):
        if [len(tokens) for tokens in theirs] != [len(tokens) for tokens in ours]:
            raise InternalError(f"{name} generated {sum(map(len, theirs))} tokens where {sum(map(len, ours))} were asked for")
        num_other = sum(mine != its for mine, its in zip(ours, theirs))
        if num_other:
            where = ", ".join(f"{key} {value}" for key, value in case.items())
            report.note(f"{where}: for {num_other} of {len(ours)} prompts {name} has other tokens than {OURS}")


_RATES: dict[str, Figure] = {
    "decode": ("tokens/s", lambda turn: [turn.decode_tokens_per_s]),
    "prompts too": ("tokens/s", lambda turn: [turn.tokens_per_s]),
}
_TIMES: dict[str, Figure] = {
    "first token": ("ms", lambda turn: [1000 * first for first in turn.first_s]),
    "each token": ("ms", lambda turn: [1000 * each for each in turn.per_token_s]),
    "between tokens": ("ms", lambda turn: [1000 * gap for gap in turn.gaps_s]),
}


def _add_rows(
    report: Report,
    case: Mapping[str, Value],
    figures: Mapping[str, Figure],
    turns: Mapping[str, Sequence[Turn]],
    facts: Mapping[str, dict[str, Value]],
) -> None:
    """Add a row for each side and figure; ``facts`` go to the first figure's, and what rates are of each other to the engine's."""
    for number, (what, (unit, samples_of)) in enumerate(figures.items()):
        rows = {side: Row({**case, "what": what}, side, unit, [samples_of(turn) for turn in each]) for side, each in turns.items()}
        for side, row in rows.items():
            row.facts |= facts[side] if number == 0 else {}
            report.add(row)
            if unit == "tokens/s" and side != OURS:
                ratio = rows[OURS].ratio_to(row)
                where = ", ".join(f"{name} {value}" for name, value in row.case.items())
                report.note(f"{where}: {OURS} is {ratio.median:.2f} times as fast as {side}, {ratio.lower:.2f} to {ratio.upper:.2f}")
