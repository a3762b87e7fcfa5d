"""The scheduler against a rank that knows only what the wire tells it, over random loads."""

from __future__ import annotations

import random
import zlib
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zspmd.config import EngineConfig, SamplingParams
from zspmd.runtime.engine.plan import ScheduledStep
from zspmd.runtime.engine.request import Sequence
from zspmd.runtime.engine.scheduler import Scheduler
from zspmd.transport.batch import BatchStep, SlotAdd, decode_batch_step, encode_batch_step

EOS = 1
VOCABULARY = 24


def prefix_hash(tokens: list[int]) -> int:
    return zlib.crc32(np.array(tokens, np.int32).tobytes())


def next_token(tokens: list[int], seed: int, may_end: bool) -> int:
    """The fake model: a pure function of history and seed. ``may_end`` False masks the end-of-sequence token."""
    token = zlib.crc32(np.array([seed, *tokens], np.int32).tobytes()) % VOCABULARY
    return token + 1 if token == EOS and not may_end else token


def expected_outputs(prompt: list[int], params: SamplingParams, seed: int, max_model_len: int) -> tuple[list[int], str]:
    """What a sequence alone, computed naively, would give."""
    outputs: list[int] = []
    while True:
        outputs.append(next_token(prompt + outputs, seed, may_end=len(outputs) >= params.min_tokens))
        if len(outputs) > params.min_tokens:
            if outputs[-1] == EOS and not params.ignore_eos:
                return outputs, "stop"
            if outputs[-1] in params.stop_token_ids:
                return outputs, "stop"
        if len(outputs) == params.max_tokens or len(prompt) + len(outputs) == max_model_len:
            return outputs, "length"


@dataclass
class Slot:
    add: SlotAdd
    tokens: list[int]
    num_computed: int
    blocks: list[int]


@dataclass
class SimulatedRank:
    """Applies batch steps as ``transport/batch.py`` says. Each position of its KV cache holds the hash of the tokens up to there.

    With ``is_told`` it forgets what it samples, as stages of a pipeline do that the driver tells what became of drafts. Where a step
    allows drafts, a decode row holds a random number of them, right and wrong ones.
    """

    config: EngineConfig
    num_blocks: int
    is_told: bool = False
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    slots: dict[int, Slot] = field(default_factory=dict)
    decode_slots: list[int] = field(default_factory=list)
    kv: dict[int, int] = field(default_factory=dict)

    def run(self, step: BatchStep) -> tuple[list[list[int]], list[int]]:
        """Return the tokens of each row that samples, and its drafts."""
        for slot in step.deletes:
            del self.slots[slot]
        for add in step.adds:
            assert 0 <= add.slot < self.config.max_num_seqs
            assert add.slot not in self.slots
            assert 0 <= add.num_computed < len(add.tokens)
            self.slots[add.slot] = Slot(add, add.tokens.tolist(), add.num_computed, add.blocks.tolist())
        for slot, block in zip(step.block_slots.tolist(), step.block_ids.tolist()):
            self.slots[slot].blocks.append(block)
        if step.decode_slots is not None:
            assert self.is_told or step.decode_slots.tolist() != self.decode_slots, "equal decode slots were sent again"
            self.decode_slots = step.decode_slots.tolist()
        assert (step.decode_tokens is not None) is self.is_told
        if step.decode_tokens is not None:
            counts = [1] * len(self.decode_slots) if step.decode_counts is None else step.decode_counts.tolist()
            assert sum(counts) == len(step.decode_tokens)
            tokens = iter(step.decode_tokens.tolist())
            for slot, count in zip(self.decode_slots, counts, strict=True):
                state = self.slots[slot]
                state.tokens += [next(tokens) for _ in range(count)]
                state.num_computed = len(state.tokens) - 1
        chunks = list(zip(step.chunk_slots.tolist(), step.chunk_tokens.tolist()))
        self.check_rows(chunks, step.max_drafts)
        sampled = [self.compute(self.slots[slot], count) for slot, count in chunks]
        sampled = [tokens for tokens in sampled if tokens]
        drafts = [0] * len(sampled)
        for slot in self.decode_slots:
            verified, num_drafts = self.verify(self.slots[slot], step.max_drafts)
            sampled.append(verified)
            drafts.append(num_drafts)
        return sampled, drafts

    def verify(self, state: Slot, max_drafts: int) -> tuple[list[int], int]:
        """Compute a decode row with drafts; returns the tokens that are kept, none where the sequence has all that it may have."""
        limit = min(state.add.max_num_tokens, len(state.blocks) * self.config.block_size + 1)
        if len(state.tokens) >= state.add.max_num_tokens:
            assert self.config.speculation is not None
            return [], 0
        known, kept = list(state.tokens), list[int]()
        right = True
        num_drafts = self.chance.randint(0, max(0, min(max_drafts, limit - len(known) - 1)))
        for position in range(len(known) - 1, len(known) + num_drafts):
            self.kv[self.flat(state, position)] = prefix_hash(state.tokens[: position + 1])
            token = self.sample(state)
            if right:
                kept.append(token)
            right = right and self.chance.random() < 0.7
            state.tokens.append(token if right else (token + 1) % VOCABULARY)
        del state.tokens[len(known) :]
        state.num_computed = len(known)
        if not self.is_told:
            state.tokens += kept
            state.num_computed = len(state.tokens) - 1
        return kept, num_drafts

    def check_rows(self, chunks: list[tuple[int, int]], max_drafts: int) -> None:
        """What is read of the cache must have been there before this step: rows of one step share nothing that they write."""
        rows = chunks + [(slot, 1 + max_drafts) for slot in self.decode_slots]
        assert rows
        assert len({slot for slot, _ in rows}) == len(rows)
        assert sum(count for _, count in rows) <= self.config.max_num_batched_tokens
        for slot, _ in rows:
            state = self.slots[slot]
            for position in range(state.num_computed):
                assert self.kv[self.flat(state, position)] == prefix_hash(state.tokens[: position + 1])
        for slot in self.decode_slots:
            state = self.slots[slot]
            assert state.num_computed == len(state.tokens) - 1 >= state.add.num_prompt

    def compute(self, state: Slot, count: int) -> list[int]:
        assert 1 <= count <= len(state.tokens) - state.num_computed
        for position in range(state.num_computed, state.num_computed + count):
            self.kv[self.flat(state, position)] = prefix_hash(state.tokens[: position + 1])
        state.num_computed += count
        if state.num_computed < len(state.tokens):
            return []
        token = self.sample(state)
        if not self.is_told:
            state.tokens.append(token)
        return [token]

    def sample(self, state: Slot) -> int:
        num_outputs = len(state.tokens) - state.add.num_prompt
        may_end = num_outputs >= state.add.min_tokens or EOS not in state.add.end_token_ids
        return next_token(state.tokens, state.add.seed, may_end)

    def flat(self, state: Slot, position: int) -> int:
        block = state.blocks[position // self.config.block_size]
        assert 0 < block < self.num_blocks
        return block * self.config.block_size + position % self.config.block_size


@dataclass
class Simulation:
    """A driver that keeps up to ``window`` steps in flight, and its one rank."""

    config: EngineConfig
    num_blocks: int
    max_model_len: int
    window: int
    chance: random.Random
    num_stages: int = 1

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.config, num_blocks=self.num_blocks, max_model_len=self.max_model_len, eos_token_ids=[EOS], num_stages=self.num_stages
        )
        is_told = self.num_stages > 1 and self.config.speculation is not None
        self.rank = SimulatedRank(self.config, self.num_blocks, is_told=is_told, chance=self.chance)
        self.pending: deque[tuple[ScheduledStep, list[list[int]], list[int]]] = deque()

    def run(self, sequences: list[Sequence], abort_share: float) -> None:
        waiting, live = deque(sequences), []
        while waiting or self.scheduler.has_work():
            while waiting and self.chance.random() < 0.5:
                live.append(waiting.popleft())
                self.scheduler.add(live[-1])
            if live and self.chance.random() < abort_share:
                victim = self.chance.choice(live)
                assert self.scheduler.abort(victim.sequence_id)
            self.advance()
            self.scheduler.validate()
            live = [sequence for sequence in live if not sequence.is_finished]

    def advance(self) -> None:
        """Publish a step or apply one; when nothing can be published, something in flight must be what it waits for."""
        step, num_running = None, 0
        if len(self.pending) < self.window and self.chance.random() < 0.8:
            num_running = self.scheduler.statistics().num_running
            step = self.scheduler.schedule()
            if step is None and not self.pending:
                assert not self.scheduler.has_work(), "work is left, nothing is in flight and nothing can be scheduled"
        if step is not None:
            tokens, drafts = self.rank.run(decode_batch_step(encode_batch_step(step.batch)))
            assert len(tokens) == len(step.sampled)
            if self.num_stages > 1:
                on_their_way = Counter(id(sequence) for published, _, _ in self.pending for sequence in published.sampled)
                most = 0 if self.rank.is_told else self.config.window - 1
                assert all(on_their_way[id(sequence)] <= most for sequence in step.sampled), "a sequence runs too far ahead of its tokens"
                assert step.num_decodes <= -(-num_running // self.num_stages), "another stage is left without its share"
            self.pending.append((step, tokens, drafts))
        elif self.pending:
            step, tokens, drafts = self.pending.popleft()
            several = () if self.config.speculation is None else ([len(row) for row in tokens], drafts)
            for update in self.scheduler.apply(step, np.array([token for row in tokens for token in row], np.int32), *several):
                assert update.finish_reason == update.sequence.finish_reason
                assert update.sequence.output_token_ids[-len(update.token_ids) :] == update.token_ids


@st.composite
def simulations(draw: st.DrawFn) -> tuple[Simulation, list[Sequence], float]:
    block_size = draw(st.sampled_from([1, 2, 4]))
    max_num_seqs = draw(st.integers(1, 6))
    max_model_len = draw(st.integers(8, 40))
    chunked = draw(st.booleans())
    config = EngineConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.integers(max_num_seqs, 24)) if chunked else max(20, max_num_seqs),
        block_size=block_size,
        enable_prefix_cache=draw(st.booleans()),
        enable_chunked_prefill=chunked,
        window=draw(st.integers(1, 3)),
        speculation=draw(st.sampled_from([None, "ngram:k=1", "ngram:k=3", "ngram:k=7"])),
    )
    fewest = -(-max_model_len // block_size) + 1
    num_blocks = draw(st.sampled_from([fewest, fewest + fewest // 2, 3 * fewest]))
    chance = random.Random(draw(st.integers(0, 1 << 32)))
    simulation = Simulation(config, num_blocks, max_model_len, draw(st.integers(1, 5)), chance, draw(st.sampled_from([1, 1, 2, 3])))
    beginnings = [[chance.randrange(2, VOCABULARY) for _ in range(12)] for _ in range(2)]
    sequences = []
    for number in range(draw(st.integers(1, 12))):
        shared = chance.choice(beginnings)[: chance.randrange(13)]
        prompt = (shared + [chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, 8))])[: max_model_len - 1]
        max_tokens = chance.randrange(1, 24)
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=chance.randrange(max_tokens + 1) if chance.random() < 0.3 else 0,
            stop_token_ids=[chance.randrange(2, VOCABULARY)] if chance.random() < 0.3 else (),
            ignore_eos=chance.random() < 0.6,
        )
        if params.min_tokens:  # the fake model masks the end-of-sequence token only
            params = SamplingParams(max_tokens=max_tokens, min_tokens=params.min_tokens)
        sequences.append(Sequence(f"s{number}", f"r{number}", np.array(prompt, np.int32), params, seed=chance.randrange(3)))
    return simulation, sequences, draw(st.sampled_from([0.0, 0.0, 0.05]))


@settings(max_examples=150, deadline=None, database=None)
@given(simulations())
def test_every_sequence_gets_the_tokens_it_would_get_alone(case: tuple[Simulation, list[Sequence], float]) -> None:
    simulation, sequences, abort_share = case
    simulation.run(sequences, abort_share)
    for sequence in sequences:
        outputs, reason = expected_outputs(sequence.prompt_token_ids.tolist(), sequence.params, sequence.seed, simulation.max_model_len)
        if sequence.finish_reason == "abort":
            assert outputs[: len(sequence.output_token_ids)] == sequence.output_token_ids
        else:
            assert (sequence.output_token_ids, sequence.finish_reason) == (outputs, reason)
    statistics = simulation.scheduler.statistics()
    assert (statistics.num_running, statistics.num_waiting, statistics.num_steps_in_flight) == (0, 0, 0)
    assert statistics.num_free_blocks == statistics.num_blocks
    assert abort_share or statistics.num_generated_tokens == sum(len(sequence.output_token_ids) for sequence in sequences)


@pytest.mark.parametrize(("window", "num_stages"), [(1, 1), (2, 1), (3, 1), (3, 2), (5, 4)])
@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "whole"])
@pytest.mark.parametrize("speculation", [None, "ngram:k=3"], ids=["plain", "speculating"])
def test_a_small_pool_preempts_and_everyone_still_finishes(window: int, num_stages: int, chunked: bool, speculation: str | None) -> None:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=16, block_size=2, enable_chunked_prefill=chunked, speculation=speculation)
    simulation = Simulation(config, num_blocks=18, max_model_len=32, window=window, chance=random.Random(7), num_stages=num_stages)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    sequences = [Sequence(f"s{i}", f"r{i}", np.arange(i, i + 8, dtype=np.int32), params, seed=i) for i in range(6)]
    simulation.run(sequences, abort_share=0.0)
    assert simulation.scheduler.statistics().num_preemptions > 0
    for sequence in sequences:
        assert sequence.output_token_ids == expected_outputs(sequence.prompt_token_ids.tolist(), params, sequence.seed, 32)[0]


def test_equal_prompts_share_blocks_and_give_equal_tokens() -> None:
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=16, block_size=4)
    simulation = Simulation(config, num_blocks=64, max_model_len=64, window=2, chance=random.Random(3))
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    sequences = [Sequence(f"s{i}", f"r{i}", np.arange(2, 22, dtype=np.int32), params, seed=5) for i in range(6)]
    simulation.run(sequences, abort_share=0.0)
    assert len({tuple(sequence.output_token_ids) for sequence in sequences}) == 1
    statistics = simulation.scheduler.statistics()
    assert statistics.num_prefix_queries == 6 * 20
    assert statistics.num_prefix_hits >= 4 * 16
