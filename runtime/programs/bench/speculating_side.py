"""An engine as a side of a benchmark of speculation: streams of prompts, and what its steps brought meanwhile."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ....config import SamplingParams
from ....errors import InternalError
from ...engine.engine import Engine
from ...engine.prompts import Prompt
from ...engine.statistics import SpeculationStatistics
from .rows import Row, Value


@dataclass(frozen=True)
class SpeculatingTurn:
    """How one turn went.

    Attributes:
        token_ids: of each answer, stream by stream.
        elapsed_s: until the last of them was there.
        num_steps: that the target took, those past the ends of answers included.
        speculation: what was proposed meanwhile; None where nothing is.
    """

    token_ids: list[list[int]]
    elapsed_s: float
    num_steps: int
    speculation: SpeculationStatistics | None

    @property
    def tokens_per_s(self) -> float:
        return sum(map(len, self.token_ids)) / self.elapsed_s


class SpeculatingSide:
    """Takes turns with an engine that has started."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def take_turn(self, streams: Sequence[Sequence[Prompt]], params: SamplingParams) -> SpeculatingTurn:
        """Answer the prompts of each stream, one after another; all streams at the same time."""
        steps, before = self._engine.group.statistics().steps, self._engine.statistics().speculation
        began_s = time.perf_counter()
        tasks = [asyncio.create_task(self._answer(prompts, params)) for prompts in streams]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        elapsed_s = time.perf_counter() - began_s
        after = self._engine.statistics().speculation
        gained = None if before is None or after is None else _subtract(after, before)
        num_steps = self._engine.group.statistics().steps - steps
        return SpeculatingTurn([tokens for stream in answers for tokens in stream], elapsed_s, num_steps, gained)

    async def _answer(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            token_ids: list[int] = []
            async for output in self._engine.generate(prompt, params):
                token_ids = output.token_ids
            answers.append(token_ids)
        return answers


def make_row(case: dict[str, Value], name: str, turns: Sequence[SpeculatingTurn]) -> Row:
    """Return a side's turns as a row: tokens a second, and as facts the target's steps of a turn and what was accepted in all."""
    row = Row(case, name, "tokens/s", [[turn.tokens_per_s] for turn in turns])
    row.facts["steps"] = statistics.median(turn.num_steps for turn in turns)
    told = [turn.speculation for turn in turns if turn.speculation is not None]
    if told:
        row.facts |= _describe(told, sum(turn.num_steps for turn in turns))
    return row


def check_same_tokens(turns: Mapping[str, Sequence[SpeculatingTurn]]) -> int:
    """Return for how many answers a side has other tokens than the first.

    Raises:
        InternalError: a side has fewer or more answers.
    """
    first, *others = [[tokens for turn in of_side for tokens in turn.token_ids] for of_side in turns.values()]
    if any(len(other) != len(first) for other in others):
        raise InternalError(f"sides of one benchmark have {[len(first), *map(len, others)]} answers")
    return sum(len(set(map(tuple, answers))) > 1 for answers in zip(first, *others))


def _subtract(after: SpeculationStatistics, before: SpeculationStatistics) -> SpeculationStatistics:
    """Return what was counted between two readings."""
    return replace(
        after,
        num_steps=after.num_steps - before.num_steps,
        num_rows=after.num_rows - before.num_rows,
        drafted=tuple(new - old for new, old in zip(after.drafted, before.drafted)),
        accepted=tuple(new - old for new, old in zip(after.accepted, before.accepted)),
        propose_s=after.propose_s - before.propose_s,
        target_s=after.target_s - before.target_s,
    )


def _describe(told: Sequence[SpeculationStatistics], num_steps: int) -> dict[str, Value]:
    """Return facts of a row: the share of steps that drafted; of these the mean accepted length, and of the drafts of each position those
    that were kept; the times of a rank, over all steps."""
    rows, drafted = sum(each.num_rows for each in told), [sum(counts) for counts in zip(*(each.drafted for each in told))]
    accepted = [sum(counts) for counts in zip(*(each.accepted for each in told))]
    return {
        "drafting %": 100 * sum(each.num_steps for each in told) / num_steps,
        "accepted": 1 + sum(accepted) / rows if rows else 1.0,
        "by position %": " ".join(f"{100 * kept / tried:.0f}" if tried else "-" for kept, tried in zip(accepted, drafted)),
        "draft us": 1e6 * sum(each.propose_s for each in told) / num_steps,
        "target us": 1e6 * sum(each.target_s for each in told) / num_steps,
    }
