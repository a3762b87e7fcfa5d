"""Data-parallel replicas behind one scheduler: who gets a request, whose step is next, and what is told of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from zspmd.config import EngineConfig, SamplingParams
from zspmd.errors import RequestError
from zspmd.runtime.engine.replicas import Replicas
from zspmd.runtime.engine.request import Sequence
from zspmd.runtime.engine.scheduler import Scheduler

WINDOW = 2


def build(count: int, *, is_lockstep: bool = False, enable_prefix_cache: bool = True) -> tuple[Replicas, list[Scheduler]]:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, block_size=4, enable_prefix_cache=enable_prefix_cache)
    ages = itertools.count()
    schedulers = [
        Scheduler(config, num_blocks=64, max_model_len=64, eos_token_ids=[1], replica=replica, ages=ages) for replica in range(count)
    ]
    return Replicas(schedulers, WINDOW, is_lockstep=is_lockstep), schedulers


def sequence_of(name: str, num_prompt: int = 6, first: int = 10) -> Sequence:
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    return Sequence(name, f"request of {name}", np.arange(first, first + num_prompt, dtype=np.int32), params, seed=7)


def held(scheduler: Scheduler) -> int:
    statistics = scheduler.statistics()
    return statistics.num_running + statistics.num_waiting


def run(replicas: Replicas) -> None:
    """Apply every step at once, to the end."""
    while steps := replicas.schedule():
        for step in steps:
            replicas.apply(step, [20] * len(step.sampled))
        replicas.validate()
    assert not replicas.has_work()


def test_requests_go_where_they_wait_for_the_fewest_tokens() -> None:
    replicas, schedulers = build(3, enable_prefix_cache=False)
    replicas.add(sequence_of("long", 30))
    replicas.add(sequence_of("a"))
    replicas.add(sequence_of("b"))
    replicas.add(sequence_of("c"), sequence_of("d"))  # of one request: they share the blocks of its prompt
    assert [held(scheduler) for scheduler in schedulers] == [1, 3, 1]


def test_a_request_goes_where_its_beginning_is_cached_unless_others_are_much_less_busy() -> None:
    replicas, schedulers = build(2)
    replicas.add(sequence_of("other", 9, first=200))
    replicas.add(sequence_of("first", 17))
    run(replicas)
    assert [scheduler.num_cached_tokens(sequence_of("again", 18)) for scheduler in schedulers] == [0, 16]
    for name in ("again", "once more"):
        replicas.add(sequence_of(name, 18))
    assert [held(scheduler) for scheduler in schedulers] == [1, 1], "18 tokens before it outweigh 16 that are cached"
    assert schedulers[1].statistics().num_waiting == 1


def test_replicas_take_turns_and_none_waits_for_another() -> None:
    replicas, _ = build(2)
    replicas.add(sequence_of("a"))
    replicas.add(sequence_of("b", first=100))
    steps = [replicas.schedule() for _ in range(2 * WINDOW + 1)]
    assert [[step.replica for step in published] for published in steps] == [[0], [1], [0], [1], []]
    (step,) = steps[1]
    replicas.apply(step, [20])  # the second answers first
    assert [step.replica for step in replicas.schedule()] == [1]


def test_in_lockstep_every_replica_with_work_has_a_step_of_what_is_published() -> None:
    replicas, _ = build(3, is_lockstep=True)
    replicas.add(sequence_of("a"))
    replicas.add(sequence_of("b", first=100))
    assert [[step.replica for step in replicas.schedule()] for _ in range(WINDOW + 1)] == [[0, 1], [0, 1], []]


def test_in_lockstep_a_replica_whose_requests_come_later_joins_the_steps_of_the_others() -> None:
    replicas, _ = build(2, is_lockstep=True)
    replicas.add(sequence_of("a"))
    in_flight = [replicas.schedule() for _ in range(WINDOW)]
    replicas.add(sequence_of("b", first=100))
    assert replicas.schedule() == [], "a step of the newcomer alone has them take turns from then on"
    for _ in range(3):
        for step in in_flight.pop(0):
            replicas.apply(step, [20])
        in_flight.append(replicas.schedule())
        assert [step.replica for step in in_flight[-1]] == [0, 1]


def test_everything_that_is_asked_of_one_is_asked_of_all() -> None:
    replicas, schedulers = build(2)
    for name in "abcd":
        replicas.add(sequence_of(name, first=100 * ord(name)))
    assert [held(scheduler) for scheduler in schedulers] == [2, 2]
    replicas.run_only({"request of b"})
    assert [step.replica for step in replicas.schedule()] == [1]
    replicas.reset()
    replicas.run_only(None)
    assert replicas.abort("d")
    assert not replicas.abort("d")
    assert replicas.finish("a", "stop")
    run(replicas)
    statistics = replicas.statistics()
    assert (statistics.num_generated_tokens, statistics.num_restarts, statistics.num_blocks) == (16, 1, 2 * 63)
    assert [one.num_generated_tokens for one in replicas.replica_statistics()] == [8, 8]


def test_what_no_replica_can_run_is_refused() -> None:
    replicas, schedulers = build(2)
    with pytest.raises(RequestError, match="max_model_len 64"):
        replicas.add(sequence_of("endless", 64))
    assert [held(scheduler) for scheduler in schedulers] == [0, 0]
