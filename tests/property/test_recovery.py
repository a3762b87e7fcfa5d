"""Recovery over random faults: every request ends exactly once, with the tokens it would have had; poison fails, nobody else does."""

from __future__ import annotations

import random
import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zspmd.config import EngineConfig, RestartPolicy, SamplingParams
from zspmd.errors import WorkerExitedError
from zspmd.runtime.engine.plan import ScheduledStep
from zspmd.runtime.engine.recovery import Recovery, Ruling
from zspmd.runtime.engine.replicas import Replicas
from zspmd.runtime.engine.request import Sequence
from zspmd.runtime.engine.scheduler import Scheduler
from zspmd.transport.batch import BatchStep, decode_batch_step, encode_batch_step

SIGKILL, SIGSEGV = -9, -11
MAX_TURNS = 20_000
BLOCK_SIZE = 2
MAX_MODEL_LEN = 24


def next_token(tokens: list[int], seed: int) -> int:
    return 2 + zlib.crc32(np.array([seed, *tokens], np.int32).tobytes()) % 20


@dataclass
class Request:
    """``poison_at``: with this many tokens, prompt included, each of its sequences ends whatever computes it; None never."""

    name: str
    sequences: list[Sequence]
    poison_at: int | None = None
    num_failures: int = 0

    @property
    def is_poison(self) -> bool:
        return self.poison_at is not None and any(self.poison_at < sequence.max_num_tokens for sequence in self.sequences)

    def expected(self, sequence: Sequence) -> list[int]:
        tokens: list[int] = sequence.prompt_token_ids.tolist()
        while len(tokens) < sequence.max_num_tokens:
            tokens.append(next_token(tokens, sequence.seed))
        return tokens[sequence.num_prompt :]


class RankDied(Exception):
    pass


@dataclass
class FakeRanks:
    """Tokens of each slot, sampled as ranks do it: ahead of the driver."""

    poison_at: dict[int, int]
    tokens: dict[int, list[int]] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)
    seeds: dict[int, int] = field(default_factory=dict)
    decode_slots: list[int] = field(default_factory=list)

    def run(self, step: BatchStep) -> list[int]:
        for slot in step.deletes:
            del self.tokens[slot]
        for add in step.adds:
            assert add.slot not in self.tokens
            self.tokens[add.slot], self.computed[add.slot], self.seeds[add.slot] = add.tokens.tolist(), add.num_computed, add.seed
        if step.decode_slots is not None:
            self.decode_slots = step.decode_slots.tolist()
        rows = [*zip(step.chunk_slots.tolist(), step.chunk_tokens.tolist()), *((slot, 1) for slot in self.decode_slots)]
        if any(len(self.tokens[slot]) >= self.poison_at.get(self.seeds[slot], MAX_MODEL_LEN + 1) for slot, _ in rows):
            raise RankDied
        sampled = []
        for slot, count in rows:
            self.computed[slot] += count
            if self.computed[slot] == len(self.tokens[slot]):
                self.tokens[slot].append(next_token(self.tokens[slot], self.seeds[slot]))
                sampled.append(self.tokens[slot][-1])
        return sampled


@dataclass
class Simulation:
    """The engine's loop with faults: outside ones at random, inside ones by poison, and starts that fail."""

    requests: list[Request]
    chance: random.Random
    window: int = 2
    outside: float = 0.0
    policy: RestartPolicy = field(default_factory=lambda: RestartPolicy(max_restarts=1000))
    num_restarts: int = 0
    num_isolations: int = 0

    def __post_init__(self) -> None:
        config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=8, block_size=BLOCK_SIZE)
        self.scheduler = Scheduler(config, num_blocks=40, max_model_len=MAX_MODEL_LEN, eos_token_ids=[1])
        self.recovery = Recovery(self.policy, Replicas([self.scheduler], window=1))
        self.poison_at = {s.seed: r.poison_at for r in self.requests for s in r.sequences if r.poison_at is not None}
        self.ranks = FakeRanks(self.poison_at)
        self.pending: deque[tuple[ScheduledStep, list[int] | None]] = deque()
        self.now = 0.0

    def run(self) -> bool:
        """Run to the end of all requests; False if the policy ended it."""
        arriving = deque(self.requests)
        for _ in range(MAX_TURNS):
            if arriving and self.chance.random() < 0.2:
                self.scheduler.add(*arriving.popleft().sequences)
            if not arriving and not self.scheduler.has_work():
                return True
            self.now += self.chance.random()
            if not self.turn():
                return False
            self.scheduler.validate()
            self.recovery.validate()
        raise AssertionError(f"not done after {MAX_TURNS} turns: {self.scheduler.statistics()}")

    def turn(self) -> bool:
        self.recovery.advance(is_drained=not self.pending)
        if self.chance.random() < self.outside:
            return self.fault(SIGKILL)
        step = self.scheduler.schedule() if len(self.pending) < self.window and self.chance.random() < 0.7 else None
        if step is not None:
            is_dead = any(answer is None for _, answer in self.pending)
            try:
                self.pending.append((step, None if is_dead else self.ranks.run(decode_batch_step(encode_batch_step(step.batch)))))
            except RankDied:
                self.pending.append((step, None))
        elif self.pending:
            published, answer = self.pending[0]
            if answer is None:
                return self.fault(SIGSEGV)
            self.pending.popleft()
            self.recovery.progressed()
            self.scheduler.apply(published, answer)
        return True

    def fault(self, exit_code: int) -> bool:
        steps = [step for step, _ in self.pending]
        self.pending.clear()
        self.ranks = FakeRanks(self.poison_at)
        if not self.rule(exit_code, steps).may_restart:
            return False
        while self.chance.random() < self.outside:  # the restart's own start fails
            if not self.rule(SIGKILL, []).may_restart:
                return False
        self.recovery.restarted()
        return True

    def rule(self, exit_code: int, steps: list[ScheduledStep]) -> Ruling:
        error = WorkerExitedError(exit_code=exit_code, rank=0)
        ruling = self.recovery.faulted(error, steps, is_from_inside=exit_code == SIGSEGV, now=self.now)
        self.num_restarts += 1
        self.num_isolations += ruling.num_suspects > 0
        if ruling.poison is not None:
            (request,) = (request for request in self.requests if request.name == ruling.poison)
            request.num_failures += 1
            for sequence in request.sequences:
                self.scheduler.abort(sequence.sequence_id)
        return ruling

    def check(self) -> None:
        for request in self.requests:
            assert request.num_failures == request.is_poison
            for sequence in request.sequences:
                expected = request.expected(sequence)
                if sequence.finish_reason == "abort":
                    assert request.is_poison
                    assert sequence.output_token_ids == expected[: len(sequence.output_token_ids)]
                else:
                    assert sequence.output_token_ids == expected
        assert self.scheduler.statistics().num_restarts == self.num_restarts


def build_request(number: int, *, num_prompt: int, max_tokens: int, n: int = 1, poison_at: int | None = None) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, n=n)
    prompt = np.arange(2, 2 + num_prompt, dtype=np.int32)
    sequences = [Sequence(f"r{number}/{index}", f"r{number}", prompt, params, seed=10 * number + index, index=index) for index in range(n)]
    return Request(f"r{number}", sequences, poison_at)


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    requests = [
        build_request(
            number,
            num_prompt=draw(st.integers(1, 12)),
            max_tokens=draw(st.integers(1, 12)),
            n=draw(st.sampled_from([1, 1, 1, 2])),
            poison_at=draw(st.sampled_from([None, None, None, 0, 6, 14])),
        )
        for number in range(draw(st.integers(1, 8)))
    ]
    return Simulation(
        requests,
        random.Random(draw(st.integers(0, 1 << 32))),
        window=draw(st.integers(1, 3)),
        outside=draw(st.sampled_from([0.0, 0.02, 0.1])),
    )


@settings(max_examples=200, deadline=None, database=None)
@given(simulations())
def test_every_request_ends_once_and_only_poison_fails(simulation: Simulation) -> None:
    assert simulation.run()
    simulation.check()


@pytest.mark.parametrize("place", [0, 3, 7], ids=["the oldest", "in the middle", "the newest"])
@pytest.mark.parametrize("poison_at", [0, 8], ids=["at its prefill", "after some tokens"])
def test_one_poison_costs_three_restarts_and_one_of_the_policy(place: int, poison_at: int) -> None:
    requests = [build_request(i, num_prompt=4, max_tokens=12, poison_at=poison_at if i == place else None) for i in range(8)]
    simulation = Simulation(requests, random.Random(5), policy=RestartPolicy(max_restarts=1, window_s=1e6))
    assert simulation.run()
    simulation.check()
    assert simulation.num_restarts <= 3
    assert simulation.recovery.budget.num_counted == 0


def test_many_poisons_do_not_take_the_others_down() -> None:
    requests = [build_request(i, num_prompt=4, max_tokens=12, poison_at=0 if i % 2 else None) for i in range(24)]
    simulation = Simulation(requests, random.Random(6), policy=RestartPolicy(max_restarts=3, window_s=1e6))
    assert simulation.run()
    simulation.check()


def test_where_every_request_fails_it_is_not_the_requests() -> None:
    requests = [build_request(i, num_prompt=4, max_tokens=12, poison_at=0) for i in range(24)]
    simulation = Simulation(requests, random.Random(7), policy=RestartPolicy(max_restarts=3, window_s=1e6))
    assert not simulation.run()
    assert sum(request.num_failures for request in requests) <= 3


def test_beyond_the_policy_it_ends() -> None:
    requests = [build_request(i, num_prompt=4, max_tokens=12) for i in range(24)]
    simulation = Simulation(requests, random.Random(8), outside=0.3, policy=RestartPolicy(max_restarts=3, window_s=1e6))
    assert not simulation.run()
    assert simulation.num_restarts == 4
    assert not any(request.num_failures for request in requests)
