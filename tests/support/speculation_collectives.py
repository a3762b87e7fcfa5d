"""The collectives of steps with drafts, worked out from what was published and answered: no rank is asked.

How far a draft model has computed each sequence follows from the steps before, and with it what the next step asks of it:

    tokens       | known ............................ | drafts        far behind: a chunk up to the newest token, then
    computed     ^ c                          ^ L - 1                 a pass a draft, the first from c on
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import zspmd
from zspmd.runtime.engine.plan import ScheduledStep
from zspmd.runtime.engine.request import Sequence as Sampled
from zspmd.runtime.engine.step_values import Verified

from .step_collectives import Collective, ModelSizes, ReplicaPart, needs_whole, sample

FAR_BEHIND = 8  # tokens, which a chunk catches up with


@dataclass
class Row:
    """What a decode row has come to: known tokens before it, drafts, and tokens that the sequence gained."""

    sequence: Sampled
    length: int
    num_drafts: int
    count: int


@dataclass
class Noted:
    """A step of one replica, and its answer once it is there."""

    step: ScheduledStep
    num_chunk_tokens: int
    counts: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)


class SpeculationLog:
    """Notes the steps of an engine that speculates.

    Args:
        draft: sizes of a draft model that is spread over the target's ranks; None where nobody is asked for drafts.
    """

    def __init__(self, engine: zspmd.Engine, patch: Any, draft: ModelSizes | None = None) -> None:
        self.steps: list[list[Noted]] = []
        self._engine, self._draft = engine, draft
        self._by_step: dict[int, Noted] = {}
        self._lengths: dict[str, int] = {}
        self._computed: dict[str, int] = {}
        schedule, meter = engine._scheduler.schedule, engine._meter
        assert meter is not None
        answered = meter.answered

        def noting() -> list[ScheduledStep]:
            steps = schedule()
            if steps:
                self.steps.append([self._note(step) for step in steps])
            return steps

        def noting_answers(step: ScheduledStep, answer: Verified) -> None:
            noted = self._by_step.pop(id(step))
            noted.counts, noted.drafts = [1] * len(step.sampled), [0] * len(step.sampled)
            if answer.counts is not None and answer.num_drafts is not None:
                noted.counts, noted.drafts = answer.counts.tolist(), answer.num_drafts.tolist()
            answered(step, answer)

        patch.setattr(engine._scheduler, "schedule", noting)
        patch.setattr(meter, "answered", noting_answers)

    def _note(self, step: ScheduledStep) -> Noted:
        noted = self._by_step[id(step)] = Noted(step, int(step.batch.chunk_tokens.sum()))
        return noted

    def take(self) -> Iterator[tuple[list[ReplicaPart], dict[int, list[Collective]]]]:
        """Yield of each step the parts of the replicas, and by replica the collectives of its draft model; forgets them."""
        steps, self.steps = self.steps, []
        for noted in steps:
            parts = [ReplicaPart()] * self._engine.parallel.dp
            drafting = {}
            for one in noted:
                rows = self._rows(one)
                drafting[one.step.replica] = self._propose(one, rows)
                parts[one.step.replica] = _part(one, rows)
            yield parts, drafting

    def _rows(self, noted: Noted) -> list[Row]:
        """Return the rows that were sampled, chunks first, and count what they have gained."""
        rows = []
        for sequence, count, drafts in zip(noted.step.sampled, noted.counts, noted.drafts, strict=True):
            length = self._lengths.get(sequence.sequence_id, sequence.num_prompt)
            self._lengths[sequence.sequence_id] = length + count
            rows.append(Row(sequence, length, drafts, count))
        return rows

    def _propose(self, noted: Noted, rows: Sequence[Row]) -> list[Collective]:
        """Return what the draft model asks for, which never says that it has nothing to say."""
        draft, tp, computed = self._draft, self._engine.parallel.tp, self._computed
        if draft is None:
            return []
        decodes = [row for row in rows[len(rows) - noted.step.num_decodes :] if row.count]
        wanting = [row for row in decodes if row.num_drafts]
        collectives: list[Collective] = []
        behind = {row.sequence.sequence_id: row.length - 1 - computed.get(row.sequence.sequence_id, 0) for row in wanting}
        far = {name: count for name, count in behind.items() if count >= FAR_BEHIND}
        if far:
            collectives += _forward(draft, tp, sum(far.values()))
        first = sum(1 + (0 if name in far else count) for name, count in behind.items())
        for place in range(max((row.num_drafts for row in wanting), default=0)):
            active = [row for row in wanting if row.num_drafts > place]
            num_whole = sum(needs_whole(row.sequence.params) for row in active)
            collectives += _forward(draft, tp, first if place == 0 else len(active))
            collectives += sample(draft, tp, len(active) - num_whole, num_whole)
        for row in wanting:
            computed[row.sequence.sequence_id] = min(row.length + row.num_drafts, row.length + row.count) - 1
        return collectives


def _part(noted: Noted, rows: Sequence[Row]) -> ReplicaPart:
    """Return what the target computes."""
    num_chunk_samples = len(rows) - noted.step.num_decodes
    sampled = [(row, 1 + row.num_drafts) for row in rows if row.count]
    num_whole = sum(count for row, count in sampled if needs_whole(row.sequence.params))
    num_rows = sum(count for _, count in sampled)
    num_decode_tokens = sum(1 + row.num_drafts for row in rows[num_chunk_samples:] if row.count)
    return ReplicaPart(noted.num_chunk_tokens + num_decode_tokens, num_rows - num_whole, num_whole, noted.step.num_tokens)


def _forward(sizes: ModelSizes, tp: int, num_tokens: int) -> list[Collective]:
    reduce = ["tp", "all_reduce", num_tokens * sizes.hidden_size]
    return [reduce] * (1 + 2 * sizes.num_layers) if tp > 1 else []
