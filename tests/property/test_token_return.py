"""Sampled tokens between the stages of a pipeline, each stage a thread with the state of a rank, under a real scheduler.

What the first stage computes goes from stage to stage in place of hidden states, and the last one, which knows every token, compares.
"""

from __future__ import annotations

import queue
import random
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from zspmd.config import EngineConfig, SamplingParams
from zspmd.runtime.engine.pipeline_parts import most_in_flight
from zspmd.runtime.engine.plan import ScheduledStep
from zspmd.runtime.engine.request import Sequence
from zspmd.runtime.engine.scheduler import Scheduler
from zspmd.transport.batch import BatchStep, decode_batch_step, encode_batch_step
from zspmd.workers.batch_inputs import StepInputs, build_inputs
from zspmd.workers.batch_state import BatchState
from zspmd.workers.token_return import TokenReturn

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 4, 20, 40
EOS, VOCABULARY = 1, 50
TIMEOUT_S = 15.0


@dataclass
class Wire:
    """What the stages share: hidden states, one at a time as where a send waits, and tokens from the last to the first."""

    hidden: list[queue.Queue[list[int]]]
    tokens: queue.Queue[torch.Tensor]
    most_on_the_way: int = 0


class StageEnd:
    """What ``TokenReturn`` uses of a communicator."""

    def __init__(self, wire: Wire, rank: int, size: int) -> None:
        self._wire, self.rank, self.size = wire, rank, size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def send_nowait(self, value: torch.Tensor, dst: int) -> None:
        assert (self.rank, dst) == (self.size - 1, 0)
        self._wire.tokens.put_nowait(value.clone())
        self._wire.most_on_the_way = max(self._wire.most_on_the_way, self._wire.tokens.qsize())

    def receive(self, value: torch.Tensor, src: int) -> torch.Tensor:
        assert (self.rank, src) == (0, self.size - 1)
        return value.copy_(self._wire.tokens.get(timeout=TIMEOUT_S))


class Stage:
    """A rank that knows the batch, and adds up nothing."""

    def __init__(self, wire: Wire, rank: int, num_stages: int, config: EngineConfig) -> None:
        self._wire, self._rank, self._is_last = wire, rank, rank == num_stages - 1
        self.state = BatchState(config.max_num_seqs, MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS)
        self._token_return = TokenReturn(StageEnd(wire, rank, num_stages), config.max_num_seqs)  # type: ignore[arg-type]  # a stand-in
        self.steps: queue.Queue[BatchStep | None] = queue.Queue()
        self.answers: queue.Queue[list[int]] = queue.Queue()

    def run(self) -> None:
        while (step := self.steps.get(timeout=TIMEOUT_S)) is not None:
            self._run(decode_batch_step(encode_batch_step(step)))

    def _run(self, step: BatchStep) -> None:
        rows = self.state.apply(step)
        self._token_return.take(self.state, step.adds, rows.slots)
        inputs = build_inputs(self.state, rows, torch.device("cpu"))
        computed = inputs.token_ids.tolist() if self._rank == 0 else self._wire.hidden[self._rank - 1].get(timeout=TIMEOUT_S)
        self.state.mark_computed(rows)
        if not self._is_last:
            self._wire.hidden[self._rank].put(computed, timeout=TIMEOUT_S)
            self._token_return.append_sampled(self.state, inputs.sampled_slots, None)
            return
        assert computed == inputs.token_ids.tolist(), "the first stage computed other tokens than were sampled"
        tokens = self._sample(inputs)
        self._token_return.append_sampled(self.state, inputs.sampled_slots, tokens)
        self.answers.put(tokens.tolist())

    def _sample(self, inputs: StepInputs) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        rows = zip(inputs.sampled_slots, inputs.sampled_places)
        return np.array([next_token(self.state.tokens[slot, :place].tolist()) for slot, place in rows], np.int32)


def next_token(tokens: list[int]) -> int:
    return zlib.crc32(np.array(tokens, np.int32).tobytes()) % VOCABULARY


def tokens_alone(sequence: Sequence) -> list[int]:
    """What the sequence, which does not stop at EOS if its parameters say so, would give by itself."""
    tokens, prompt = list[int](), sequence.prompt_token_ids.tolist()
    while len(tokens) < sequence.params.max_tokens and len(prompt) + len(tokens) < MAX_MODEL_LEN:
        tokens.append(next_token(prompt + tokens))
        if tokens[-1] == EOS and not sequence.params.ignore_eos:
            break
    return tokens


class Pipeline:
    """A scheduler, its steps in flight, and the stages that compute them."""

    def __init__(self, num_stages: int, window: int, chance: random.Random) -> None:
        config = EngineConfig(max_num_seqs=7, max_num_batched_tokens=16, block_size=BLOCK_SIZE, window=window)
        self.wire = Wire([queue.Queue(maxsize=1) for _ in range(num_stages - 1)], queue.Queue())
        self.scheduler = Scheduler(config, num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN, eos_token_ids=[EOS], num_stages=num_stages)
        self._window = most_in_flight(window, num_stages, is_told=False)
        self._stages = [Stage(self.wire, rank, num_stages, config) for rank in range(num_stages)]
        self._pending: deque[ScheduledStep] = deque()
        self._chance = chance
        self.num_ahead = 0  # steps that were published before the tokens they go on with were back

    def run(self, sequences: list[Sequence]) -> None:
        with ThreadPoolExecutor(len(self._stages)) as pool:
            runs = [pool.submit(stage.run) for stage in self._stages]
            try:
                self._serve(sequences, runs)
            finally:
                for stage in self._stages:
                    stage.steps.put(None)
            for run in runs:
                run.result(timeout=TIMEOUT_S)

    def _serve(self, sequences: list[Sequence], runs: list[Future[None]]) -> None:
        waiting, live = deque(sequences), list[Sequence]()
        while waiting or self.scheduler.has_work():
            while waiting and (not live or self._chance.random() < 0.3):
                live.append(waiting.popleft())
                self.scheduler.add(live[-1])
            if live and self._chance.random() < 0.03:
                self.scheduler.abort(self._chance.choice(live).sequence_id)
            if len(self._pending) == self._window or not self._publish():
                self._take_in(runs)
            self.scheduler.validate()
            live = [sequence for sequence in live if not sequence.is_finished]

    def _publish(self) -> bool:
        step = self.scheduler.schedule()
        if step is None:
            return False
        on_their_way = {id(sequence) for published in self._pending for sequence in published.sampled}
        self.num_ahead += any(id(sequence) in on_their_way for sequence in step.sampled)
        self._pending.append(step)
        for stage in self._stages:
            stage.steps.put(step.batch)
        return True

    def _take_in(self, runs: list[Future[None]]) -> None:
        if not self._pending:
            assert not self.scheduler.has_work(), "nothing is in flight and nothing can be scheduled"
            return
        while True:
            try:
                answer = self._stages[-1].answers.get(timeout=0.1)
                break
            except queue.Empty:
                for run in runs:
                    if run.done():
                        run.result()
        self.scheduler.apply(self._pending.popleft(), answer)


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_the_first_stage_computes_what_the_last_has_sampled(num_stages: int, seed: int) -> None:
    chance = random.Random(f"{num_stages} {seed}")
    shared = [chance.randrange(2, VOCABULARY) for _ in range(8)]
    sequences = []
    for number in range(30):
        prompt = shared[: chance.choice((0, 0, 8))] + [chance.randrange(2, VOCABULARY) for _ in range(chance.choice((1, 5, 22)))]
        params = SamplingParams(max_tokens=chance.choice((1, 2, 12, 30)), ignore_eos=chance.random() < 0.7)
        sequences.append(Sequence(f"s{number}", f"r{number}", np.array(prompt, np.int32), params, seed=0))
    pipeline = Pipeline(num_stages, chance.choice((1, 2, 2, 3)) if seed else 2, chance)
    pipeline.run(sequences)
    for sequence in sequences:
        outputs = tokens_alone(sequence)
        if sequence.finish_reason == "abort":
            outputs = outputs[: len(sequence.output_token_ids)]
        assert sequence.output_token_ids == outputs
    if not seed:
        assert pipeline.num_ahead > 10, "hardly any step was published before the tokens that it goes on with were back"
        assert pipeline.scheduler.statistics().num_preemptions
        assert pipeline.scheduler.statistics().num_prefix_hits


def test_tokens_that_are_never_needed_do_not_pile_up() -> None:
    pipeline = Pipeline(2, 2, random.Random(1))
    params = SamplingParams(max_tokens=1)
    pipeline.run([Sequence(f"s{number}", f"r{number}", np.array([2, number], np.int32), params, seed=0) for number in range(100)])
    assert 1 <= pipeline.wire.most_on_the_way <= 2 * 2 + 1
