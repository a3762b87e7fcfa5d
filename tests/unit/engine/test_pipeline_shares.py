"""How a scheduler shares running sequences out among the steps that fill a pipeline."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from zspmd import Engine, EngineConfig, ParallelConfig, SamplingParams
from zspmd.runtime.engine.pipeline_parts import most_in_flight
from zspmd.runtime.engine.plan import ScheduledStep
from zspmd.runtime.engine.request import Sequence
from zspmd.runtime.engine.scheduler import Scheduler

SPECULATIONS = pytest.mark.parametrize("speculation", [None, "ngram:k=2"], ids=["plain", "speculating"])


MAX_STEP_TOKENS = 64


class Pipe:
    """A scheduler and the steps in flight, whose tokens come back one step after another."""

    def __init__(self, num_stages: int, *, window: int = 2, speculation: str | None = None) -> None:
        config = EngineConfig(
            max_num_seqs=64, max_num_batched_tokens=MAX_STEP_TOKENS, enable_prefix_cache=False, window=window, speculation=speculation
        )
        self.scheduler = Scheduler(config, num_blocks=999, max_model_len=999, eos_token_ids=[], num_stages=num_stages)
        self._window = most_in_flight(window, num_stages, is_told=speculation is not None)
        self._in_flight: deque[ScheduledStep] = deque()
        self.published: list[list[str]] = []  # of each step the sequences

    def add(self, name: str, *, num_prompt: int = 3) -> None:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        self.scheduler.add(Sequence(name, f"request of {name}", np.ones(num_prompt, np.int32), params, seed=0))

    def turn(self) -> int:
        """Publish while there is room, take the oldest step's tokens in, and return how many there were."""
        while len(self._in_flight) < self._window and (step := self.scheduler.schedule()) is not None:
            self._in_flight.append(step)
            self.published.append([sequence.sequence_id for sequence in step.sampled])
        done = self._in_flight.popleft()
        several = ([1] * len(done.sampled), [0] * len(done.sampled)) if done.batch.max_drafts else ()
        self.scheduler.apply(done, [1] * len(done.sampled), *several)
        self.scheduler.validate()
        return len(done.sampled)


@pytest.mark.parametrize(
    ("num_stages", "num_sequences", "shares"),
    [(2, 8, [4, 4]), (2, 3, [2, 1]), (4, 6, [2, 2, 1, 1]), (4, 3, [1, 1, 1]), (3, 7, [3, 2, 2]), (4, 1, [1])],
)
@SPECULATIONS
def test_sequences_that_come_back_together_are_shared_out_evenly(
    num_stages: int, num_sequences: int, shares: list[int], speculation: str | None
) -> None:
    pipe = Pipe(num_stages, speculation=speculation)
    for number in range(num_sequences):
        pipe.add(f"s{number}")
    assert pipe.turn() == num_sequences  # their prompts
    assert [pipe.turn() for _ in range(3 * len(shares))] == shares * 3


@pytest.mark.parametrize(("num_stages", "num_sequences"), [(2, 8), (2, 5), (3, 7), (4, 16), (4, 5)])
@pytest.mark.parametrize("window", [1, 2, 3])
@SPECULATIONS
def test_sequences_that_begin_one_after_another_come_together_in_as_many_steps_as_stages(
    num_stages: int, num_sequences: int, window: int, speculation: str | None
) -> None:
    pipe = Pipe(num_stages, window=min(window, num_stages), speculation=speculation)
    for number in range(num_sequences):
        pipe.add(f"s{number}")
        pipe.turn()
    for _ in range(4 * num_stages):
        pipe.turn()
    shares = [pipe.turn() for _ in range(num_stages)]
    assert sum(shares) == num_sequences
    assert max(shares) == -(-num_sequences // num_stages)


@pytest.mark.parametrize(
    ("pp", "window", "wanted", "with_drafts"), [(1, 1, 1, 1), (1, 3, 3, 3), (2, 1, 2, 2), (2, 2, 3, 2), (4, 2, 5, 4), (2, 5, 6, 5)]
)
def test_an_engine_keeps_a_step_for_each_stage_in_flight_and_the_next(pp: int, window: int, wanted: int, with_drafts: int) -> None:
    for speculation, steps in ((None, wanted), ("ngram:k=2", with_drafts)):
        config = EngineConfig(window=window, speculation=speculation)
        assert Engine("demo", parallel=ParallelConfig(pp=pp), config=config)._window == steps


@pytest.mark.parametrize(("num_stages", "num_sequences"), [(2, 1), (2, 2), (2, 5), (3, 7), (4, 3), (4, 16)])
def test_a_part_is_published_before_its_answer_is_there_and_behind_all_other_parts(num_stages: int, num_sequences: int) -> None:
    pipe = Pipe(num_stages)
    for number in range(num_sequences):
        pipe.add(f"s{number}")
    for _ in range(10):
        pipe.turn()
    num_parts = min(num_stages, num_sequences)
    num_answered, most = 10, min(num_stages + 1, 2 * num_parts)  # a sequence is in two steps in flight at most
    assert len(pipe.published) == num_answered + most - 1
    rounds = pipe.published[-2 * num_parts :]
    assert rounds[:num_parts] == rounds[num_parts:]
    assert sorted(name for names in rounds[:num_parts] for name in names) == sorted(f"s{number}" for number in range(num_sequences))


def test_a_prompt_in_chunks_does_not_wait_for_tokens_in_each_of_its_steps() -> None:
    pipe = Pipe(num_stages=2)
    pipe.add("s0")
    for _ in range(3):
        pipe.turn()
    pipe.add("long", num_prompt=9 * MAX_STEP_TOKENS)
    for _ in range(10):
        pipe.turn()
    names = pipe.published[5:11]
    assert names in ([["s0"], []] * 3, [[], ["s0"]] * 3)


def test_with_more_steps_in_flight_than_stages_those_that_wait_for_their_tokens_stay_apart() -> None:
    """Why there are as many: what is more are smaller steps, each of which takes a stage about as long."""
    pipe = Pipe(num_stages=2, window=3, speculation="ngram:k=2")
    for number in range(6):
        pipe.add(f"s{number}")
        pipe.turn()
    for _ in range(20):
        pipe.turn()
    assert sum(pipe.turn() for _ in range(2)) < 6
    assert sum(pipe.turn() for _ in range(3)) == 6


def test_a_sequence_that_ends_leaves_the_others_shared_out_evenly() -> None:
    pipe = Pipe(num_stages=4)
    for number in range(8):
        pipe.add(f"s{number}")
    pipe.turn()
    assert [pipe.turn() for _ in range(4)] == [2, 2, 2, 2]
    pipe.scheduler.finish("s0", "stop")
    pipe.scheduler.finish("s1", "stop")
    for _ in range(16):
        pipe.turn()
    assert sorted(pipe.turn() for _ in range(4)) == [1, 1, 2, 2]
