"""How a scheduler shares running sequences out among the steps that fill a pipeline."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from zspmd import Engine, EngineConfig, ParallelConfig, SamplingParams
from zspmd.runtime.engine.plan import ScheduledStep
from zspmd.runtime.engine.request import Sequence
from zspmd.runtime.engine.scheduler import Scheduler


class Pipe:
    """A scheduler and the steps in flight, whose tokens come back one step after another."""

    def __init__(self, num_stages: int, window: int) -> None:
        config = EngineConfig(max_num_seqs=64, enable_prefix_cache=False)
        self.scheduler = Scheduler(config, num_blocks=999, max_model_len=999, eos_token_ids=[], num_stages=num_stages)
        self._window = window
        self._in_flight: deque[ScheduledStep] = deque()

    def add(self, name: str) -> None:
        params = SamplingParams(max_tokens=200, ignore_eos=True)
        self.scheduler.add(Sequence(name, f"request of {name}", np.ones(3, np.int32), params, seed=0))

    def turn(self) -> int:
        """Publish while there is room, take the oldest step's tokens in, and return how many there were."""
        while len(self._in_flight) < self._window and (step := self.scheduler.schedule()) is not None:
            self._in_flight.append(step)
        done = self._in_flight.popleft()
        self.scheduler.apply(done, [1] * len(done.sampled))
        self.scheduler.validate()
        return len(done.sampled)


@pytest.mark.parametrize(
    ("num_stages", "num_sequences", "shares"),
    [(2, 8, [4, 4]), (2, 3, [2, 1]), (4, 6, [2, 2, 1, 1]), (4, 3, [1, 1, 1]), (3, 7, [3, 2, 2])],
)
def test_sequences_that_come_back_together_are_shared_out_evenly(num_stages: int, num_sequences: int, shares: list[int]) -> None:
    pipe = Pipe(num_stages, window=num_stages)
    for number in range(num_sequences):
        pipe.add(f"s{number}")
    assert pipe.turn() == num_sequences  # their prompts
    assert [pipe.turn() for _ in range(3 * len(shares))] == shares * 3


@pytest.mark.parametrize(("num_stages", "num_sequences"), [(2, 8), (2, 5), (3, 7), (4, 16), (4, 5)])
def test_sequences_that_begin_one_after_another_come_together_in_as_many_steps_as_stages(num_stages: int, num_sequences: int) -> None:
    pipe = Pipe(num_stages, window=num_stages)
    for number in range(num_sequences):
        pipe.add(f"s{number}")
        pipe.turn()
    for _ in range(4 * num_stages):
        pipe.turn()
    shares = [pipe.turn() for _ in range(num_stages)]
    assert sum(shares) == num_sequences
    assert max(shares) == -(-num_sequences // num_stages)


@pytest.mark.parametrize(("pp", "window", "wanted"), [(1, 1, 1), (1, 3, 3), (2, 2, 2), (4, 2, 4), (2, 5, 5)])
def test_an_engine_keeps_as_many_steps_in_flight_as_it_has_stages(pp: int, window: int, wanted: int) -> None:
    assert Engine("demo", parallel=ParallelConfig(pp=pp), config=EngineConfig(window=window))._window == wanted


def test_with_more_steps_in_flight_than_stages_they_stay_apart() -> None:
    """Why it does: what is more are smaller steps, each of which takes a stage about as long."""
    pipe = Pipe(num_stages=2, window=3)
    for number in range(6):
        pipe.add(f"s{number}")
        pipe.turn()
    for _ in range(20):
        pipe.turn()
    assert sum(pipe.turn() for _ in range(2)) < 6
    assert sum(pipe.turn() for _ in range(3)) == 6


def test_a_sequence_that_ends_leaves_the_others_shared_out_evenly() -> None:
    pipe = Pipe(num_stages=4, window=4)
    for number in range(8):
        pipe.add(f"s{number}")
    pipe.turn()
    assert [pipe.turn() for _ in range(4)] == [2, 2, 2, 2]
    pipe.scheduler.finish("s0", "stop")
    pipe.scheduler.finish("s1", "stop")
    for _ in range(16):
        pipe.turn()
    assert sorted(pipe.turn() for _ in range(4)) == [1, 1, 2, 2]
