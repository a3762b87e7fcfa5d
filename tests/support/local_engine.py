"""The scheduler and one rank's model worker in this process, without driver and wire: a whole workload takes a fraction of a second."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from zspmd.config import EngineConfig, ParallelConfig, SamplingParams
from zspmd.runtime.engine.plan import ScheduledStep
from zspmd.runtime.engine.request import Sequence
from zspmd.runtime.engine.scheduler import Scheduler
from zspmd.speculation_config import SpeculationConfig
from zspmd.topology import AxisGroup, axis_group
from zspmd.transformers_config import read_any_config
from zspmd.transport.batch import decode_batch_step, encode_batch_step
from zspmd.transport.step_cost import CATCH_UP, StepCost, batch_bucket
from zspmd.transport.trace_spans import NO_TRACE, Trace
from zspmd.workers.communicators.solo import SoloCommunicator
from zspmd.workers.model_worker import ModelWorker

MAX_MODEL_LEN = 96


class StandInMesh(dict[str, Any]):
    """The communicators by axis."""

    parallel = ParallelConfig()

    def group(self, axis: str) -> AxisGroup:
        return axis_group(ParallelConfig(), axis, 0)


@dataclass
class StandInContext:
    """What a model worker uses of ``WorkerContext``."""

    mesh: StandInMesh
    rank: int = 0
    device: str = "cpu"
    trace: Trace = NO_TRACE
    progress: list[tuple[int, int, str]] = field(default_factory=list)

    def report_progress(self, done: int, total: int, what: str) -> None:
        self.progress.append((done, total, what))


@dataclass(frozen=True)
class Request:
    """A sequence to come; ``seed`` names it too."""

    prompt: list[int]
    params: SamplingParams
    seed: int


@dataclass
class Answer:
    """What became of a request: tokens, the reason, and a log-probability for each token where they were asked for."""

    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[float] = field(default_factory=list)


class LocalEngine:
    """Runs requests to their ends.

    Args:
        directory: of the checkpoint.
        config: sizes, ``window`` included; ``num_blocks`` must be given.
        communicator: the tensor-parallel axis; None for one rank. Ranks that share it must be given equal arguments.
        worker: the class of the worker.
        chance: decides when requests join and which are aborted, and what steps are said to take.
    """

    def __init__(
        self,
        directory: Path,
        config: EngineConfig,
        *,
        communicator: Any = None,
        worker: type[ModelWorker] = ModelWorker,
        chance: int = 0,
        max_model_len: int = MAX_MODEL_LEN,
    ) -> None:
        assert config.num_blocks is not None
        self.config, self._chance = config, random.Random(chance)
        self.scheduler = Scheduler(
            config, num_blocks=config.num_blocks, max_model_len=max_model_len, eos_token_ids=read_any_config(directory).eos_token_ids
        )
        tp = SoloCommunicator(axis_group(ParallelConfig(), "tp", 0)) if communicator is None else communicator
        mesh = StandInMesh(tp=tp, pp=SoloCommunicator(axis_group(ParallelConfig(), "pp", 0)))
        self.worker = worker()
        self.worker.ctx = StandInContext(mesh, tp.rank)  # type: ignore[assignment]  # a stand-in
        speculation = config.speculation
        assert speculation is None or isinstance(speculation, SpeculationConfig)
        self.worker.setup(
            model=str(directory),
            dtype=config.dtype,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            speculation=None if speculation is None else speculation.to_plain(),
        )
        self.worker.allocate_kv_cache(config.num_blocks)
        self._pending: deque[tuple[ScheduledStep, list[Any]]] = deque()
        self.num_steps = 0
        self.depths: list[int] = []
        self.num_drafted = self.num_accepted = 0

    def run(self, requests: SequenceOf[Request], *, abort_share: float = 0.0, join_share: float = 0.5) -> list[Answer]:
        """Return what becomes of the requests, which join one after another, each at a step that chance chooses."""
        sequences = [Sequence(f"s{r.seed}", f"r{r.seed}", np.array(r.prompt, np.int32), r.params, r.seed) for r in requests]
        answers = [Answer(sequence.output_token_ids, None) for sequence in sequences]
        self._answers = {id(sequence): answer for sequence, answer in zip(sequences, answers, strict=True)}
        waiting, live = deque(sequences), list[Sequence]()
        while waiting or self.scheduler.has_work():
            while waiting and (not live or self._chance.random() < join_share):
                live.append(waiting.popleft())
                self.scheduler.add(live[-1])
            if live and self._chance.random() < abort_share:
                assert self.scheduler.abort(self._chance.choice(live).sequence_id)
            self._advance()
            self.scheduler.validate()
            live = [sequence for sequence in live if not sequence.is_finished]
        for sequence, answer in zip(sequences, answers, strict=True):
            answer.finish_reason = sequence.finish_reason
        return answers

    def _advance(self) -> None:
        """Publish a step, which the rank runs at once, or take in an answer."""
        step = self.scheduler.schedule() if len(self._pending) < self.config.window and self._chance.random() < 0.8 else None
        if step is not None:
            if self.config.speculation is not None and step.num_decodes:
                step.batch = replace(step.batch, costs=self._invent_costs(step.num_decodes))
            self._pending.append((step, self.worker.step(encode_batch_step(decode_batch_step(encode_batch_step(step.batch))))))
            self.num_steps += 1
        elif self._pending:
            self._take_in(*self._pending.popleft())

    def _invent_costs(self, num_sequences: int) -> tuple[StepCost, ...]:
        """Return costs now and then, such as make every depth the best of all at some time."""
        if self._chance.random() < 0.7:
            return ()
        depth = self._chance.choice([0, 1, self.scheduler._max_drafts, CATCH_UP])
        return (StepCost(batch_bucket(num_sequences), depth, self._chance.randint(100, 300)),)

    def _take_in(self, step: ScheduledStep, answer: list[Any]) -> None:
        tokens, logprobs, *speculated = answer
        counts = drafts = None
        if speculated:
            self.depths.append(speculated[2][0])
            if speculated[0] is not None:
                counts, drafts = speculated[0].tolist(), speculated[1].tolist()
                self.num_drafted += sum(drafts)
                self.num_accepted += sum(max(0, count - 1) for count in counts)
        numbers = [1] * len(step.sampled) if counts is None else counts
        rows, end = {}, 0
        for sequence, count in zip(step.sampled, numbers, strict=True):
            rows[id(sequence)] = [None] * count if logprobs is None else logprobs[end : end + count]
            end += count
        for update in self.scheduler.apply(step, tokens, counts, drafts):
            own = rows[id(update.sequence)][: len(update.token_ids)]
            self._answers[id(update.sequence)].logprobs += [row[0] for row in own if row is not None]
