"""Isolation: single decisions; ``tests/property/test_recovery.py`` has the random faults."""

from __future__ import annotations

import numpy as np
import pytest

from zspmd.config import EngineConfig, SamplingParams
from zspmd.errors import InternalError
from zspmd.runtime.engine.isolation import Isolation, Suspect, suspects_of
from zspmd.runtime.engine.request import Sequence
from zspmd.runtime.engine.scheduler import Scheduler


def sequence_of(name: str, num_prompt: int = 3) -> Sequence:
    return Sequence(f"{name}/0", name, np.arange(num_prompt, dtype=np.int32), SamplingParams(max_tokens=8), seed=1)


def suspect_of(name: str) -> Suspect:
    return Suspect(name, {sequence_of(name): 5})


def clear(suspect: Suspect) -> None:
    for sequence, goal in suspect.goals.items():
        sequence.output_token_ids += [9] * (goal - sequence.num_known)


def order_of_trials(suspects: list[Suspect]) -> list[str]:
    isolation, order = Isolation(suspects), []
    while not isolation.advance(is_drained=True):
        (name,) = isolation.admitted
        order.append(name)
        clear(next(suspect for suspect in suspects if suspect.request_id == name))
    return order


def test_the_newest_and_the_oldest_are_tried_in_turn() -> None:
    assert order_of_trials([suspect_of(name) for name in "abcde"]) == ["e", "a", "d", "b", "c"]


def test_nobody_runs_until_the_steps_of_the_last_trial_are_back() -> None:
    suspects = [suspect_of("a"), suspect_of("b")]
    isolation = Isolation(suspects)
    assert not isolation.advance(is_drained=True)
    assert isolation.admitted == {"b"}
    clear(suspects[1])
    assert not isolation.advance(is_drained=False)
    assert isolation.admitted == frozenset()
    assert not isolation.advance(is_drained=True)
    assert isolation.admitted == {"a"}


def test_a_request_is_poison_at_the_second_strike() -> None:
    suspects = [suspect_of("a"), suspect_of("b")]
    isolation = Isolation(suspects)
    isolation.advance(is_drained=True)
    assert isolation.strike([suspects[1]]) is None
    assert isolation.admitted == {"b"}, "it is tried again"
    assert isolation.strike([suspects[1]]) is suspects[1]
    assert isolation.admitted == frozenset()
    isolation.advance(is_drained=True)
    assert isolation.admitted == {"a"}, "the others are tried too"


def test_a_request_that_gets_on_after_a_strike_is_cleared() -> None:
    suspects = [suspect_of("a"), suspect_of("b")]
    isolation = Isolation(suspects)
    isolation.advance(is_drained=True)
    assert isolation.strike([suspects[1]]) is None
    clear(suspects[1])
    assert not isolation.advance(is_drained=True)
    assert isolation.admitted == {"a"}


def test_a_single_suspect_has_run_alone_already() -> None:
    suspect = suspect_of("a")
    isolation = Isolation([suspect])
    isolation.advance(is_drained=True)
    assert isolation.strike([suspect]) is suspect


def test_a_suspect_that_ends_meanwhile_is_passed_over() -> None:
    suspects = [suspect_of("a"), suspect_of("b")]
    scheduler = Scheduler(EngineConfig(), num_blocks=8, max_model_len=64, eos_token_ids=[])
    (sequence,) = suspects[1].goals
    scheduler.add(sequence)
    scheduler.abort(sequence.sequence_id)
    isolation = Isolation(suspects)
    isolation.advance(is_drained=True)
    assert isolation.admitted == {"a"}
    assert isolation.strike([]) is None, "its steps held nobody who is unfinished"


def test_a_trial_with_two_requests_is_a_bug() -> None:
    suspects = [suspect_of("a"), suspect_of("b")]
    isolation = Isolation(suspects)
    isolation.advance(is_drained=True)
    with pytest.raises(InternalError, match=r"b was to run alone, but \['a', 'b'\] did"):
        isolation.strike(suspects)


def test_suspects_are_the_unfinished_requests_in_flight_with_what_they_had_in_flight() -> None:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=8, block_size=4)
    scheduler = Scheduler(config, num_blocks=32, max_model_len=64, eos_token_ids=[])
    old, gone, long = sequence_of("old"), sequence_of("gone"), sequence_of("long", num_prompt=20)
    scheduler.add(old)
    scheduler.add(gone)
    scheduler.add(long)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None
    assert second is not None
    assert (first.unsampled, second.unsampled) == ((long,), (long,))
    scheduler.abort(gone.sequence_id)
    suspects = suspects_of([first, second])
    assert [suspect.request_id for suspect in suspects] == ["old", "long"]
    assert suspects[0].goals == {old: 3 + 2}
    assert suspects[1].goals == {long: 20 + 1}
