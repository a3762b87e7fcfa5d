"""Scheduler: single decisions; ``tests/property/test_scheduler.py`` has the random loads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from zspmd.config import EngineConfig, SamplingParams
from zspmd.errors import InternalError, RequestError
from zspmd.runtime.engine.plan import ScheduledStep
from zspmd.runtime.engine.request import Sequence, SequenceState
from zspmd.runtime.engine.scheduler import Scheduler
from zspmd.transport.batch import encode_batch_step

EOS = 1


def build(num_blocks: int = 64, max_model_len: int = 64, **settings: object) -> Scheduler:
    defaults: dict[str, object] = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4, "enable_prefix_cache": False}
    config = EngineConfig(**(defaults | settings))  # type: ignore[arg-type]  # checked by EngineConfig
    return Scheduler(config, num_blocks=num_blocks, max_model_len=max_model_len, eos_token_ids=[EOS])


def sequence_of(name: str, num_prompt: int, **params: object) -> Sequence:
    defaults: dict[str, object] = {"max_tokens": 8}
    sampling = SamplingParams(**(defaults | params))  # type: ignore[arg-type]  # checked by SamplingParams
    return Sequence(name, f"request of {name}", np.arange(10, 10 + num_prompt, dtype=np.int32), sampling, seed=7)


def must_schedule(scheduler: Scheduler) -> ScheduledStep:
    step = scheduler.schedule()
    scheduler.validate()
    assert step is not None
    return step


def chunks(step: ScheduledStep) -> list[tuple[int, int]]:
    return list(zip(step.batch.chunk_slots.tolist(), step.batch.chunk_tokens.tolist()))


def test_a_steady_decode_names_no_slot() -> None:
    scheduler = build()
    scheduler.add(sequence_of("a", 3), sequence_of("b", 2))
    first, second, third = (must_schedule(scheduler) for _ in range(3))
    assert chunks(first) == [(0, 3), (1, 2)]
    assert first.batch.decode_slots is None, "the rank begins with no decode slots"
    assert second.batch.decode_slots is not None
    assert second.batch.decode_slots.tolist() == [0, 1]
    assert third.batch.decode_slots is None
    assert third.batch.block_slots.tolist() == [0], "position 4 of a needs its second block"
    assert [sequence.sequence_id for sequence in third.sampled] == ["a", "b"]
    assert len(encode_batch_step(third.batch)) == 16 + 6


def test_chunks_come_before_decodes_and_only_the_last_chunk_is_sampled() -> None:
    scheduler = build(max_num_batched_tokens=8)
    scheduler.add(sequence_of("a", 2))
    must_schedule(scheduler)
    scheduler.add(sequence_of("long", 12))
    second, third = must_schedule(scheduler), must_schedule(scheduler)
    assert (chunks(second), [s.sequence_id for s in second.sampled], second.num_tokens) == ([(1, 7)], ["a"], 8)
    assert (chunks(third), [s.sequence_id for s in third.sampled], third.num_tokens) == ([(1, 5)], ["long", "a"], 6)


def test_nothing_is_scheduled_beyond_max_tokens() -> None:
    scheduler = build()
    sequence = sequence_of("a", 3, max_tokens=2)
    scheduler.add(sequence)
    steps = [must_schedule(scheduler), must_schedule(scheduler)]
    assert scheduler.schedule() is None
    assert [scheduler.apply(step, [5])[0].finish_reason for step in steps] == [None, "length"]
    assert not scheduler.has_work()
    scheduler.validate()


def test_the_model_length_ends_a_sequence() -> None:
    scheduler = build(max_model_len=5)
    sequence = sequence_of("a", 3)
    scheduler.add(sequence)
    steps = [must_schedule(scheduler), must_schedule(scheduler)]
    assert scheduler.schedule() is None
    assert [scheduler.apply(step, [5])[0].finish_reason for step in steps] == [None, "length"]


def test_a_stop_seen_late_discards_what_was_published_meanwhile() -> None:
    scheduler = build()
    ending, other = sequence_of("ending", 3), sequence_of("other", 3)
    scheduler.add(ending, other)
    steps = [must_schedule(scheduler) for _ in range(3)]
    updates = scheduler.apply(steps[0], [EOS, 5])
    assert [(u.sequence.sequence_id, u.token_ids, u.finish_reason) for u in updates] == [("ending", [EOS], "stop"), ("other", [5], None)]
    assert scheduler.statistics().num_free_blocks == 63 - 2, "its blocks are free at once"
    joining = sequence_of("joining", 2)
    scheduler.add(joining)
    fourth = must_schedule(scheduler)
    assert list(fourth.batch.deletes) == [0]
    assert [add.slot for add in fourth.batch.adds] == [0], "the slot goes to the next sequence in the same step"
    assert [u.sequence.sequence_id for u in scheduler.apply(steps[1], np.array([6, 6]))] == ["other"]
    assert [u.sequence.sequence_id for u in scheduler.apply(steps[2], np.array([7, 7]))] == ["other"]
    assert (ending.output_token_ids, ending.finish_reason, ending.stop_reason) == ([EOS], "stop", None)
    assert scheduler.statistics().num_discarded == 2
    scheduler.validate()


def test_a_preempted_sequence_returns_only_with_all_its_tokens() -> None:
    scheduler = build(num_blocks=6)
    a, b, c = (sequence_of(name, 4) for name in "abc")
    scheduler.add(a, b, c)
    first, second = must_schedule(scheduler), must_schedule(scheduler)
    assert (c.state, c.num_in_flight) == (SequenceState.PREEMPTED, 1)
    assert list(second.batch.deletes) == [2]
    scheduler.abort("a")
    third = must_schedule(scheduler)
    assert third.batch.adds == (), "the token sampled in the first step is unknown"
    scheduler.apply(first, [5, 6, 7])
    (add,) = must_schedule(scheduler).batch.adds
    assert (add.tokens.tolist(), add.num_prompt, add.num_computed) == ([10, 11, 12, 13, 7], 4, 0)
    assert scheduler.statistics().num_preemptions == 1


def test_a_preempted_sequence_can_finish_while_it_waits() -> None:
    scheduler = build(num_blocks=6)
    scheduler.add(*(sequence_of(name, 4) for name in "abc"))
    first = must_schedule(scheduler)
    must_schedule(scheduler)
    assert [u.finish_reason for u in scheduler.apply(first, [5, 6, EOS])] == [None, None, "stop"]
    assert scheduler.num_waiting == 0
    scheduler.validate()


def test_a_later_step_shares_the_blocks_of_an_earlier_one_but_not_of_its_own() -> None:
    scheduler = build(enable_prefix_cache=True, max_num_batched_tokens=64)
    scheduler.add(sequence_of("a", 9), sequence_of("twin", 9))
    first = must_schedule(scheduler)
    assert [add.num_computed for add in first.batch.adds] == [0, 0]
    scheduler.add(sequence_of("later", 9), sequence_of("exact", 8))
    later, exact = must_schedule(scheduler).batch.adds
    assert (later.num_computed, later.blocks.tolist()[:2]) == (8, first.batch.adds[0].blocks.tolist()[:2])
    assert exact.num_computed == 4, "one token is left to compute"
    statistics = scheduler.statistics()
    assert (statistics.num_prefix_queries, statistics.num_prefix_hits) == (9 + 9 + 9 + 8, 8 + 4)


def test_salts_keep_prompts_apart() -> None:
    scheduler = build(enable_prefix_cache=True)
    scheduler.add(sequence_of("a", 9))
    must_schedule(scheduler)
    salted = Sequence("b", "r", np.arange(10, 19, dtype=np.int32), SamplingParams(), seed=0, cache_salt=b"tenant")
    scheduler.add(salted)
    assert must_schedule(scheduler).batch.adds[0].num_computed == 0


def test_without_chunks_a_prompt_waits_for_a_step_that_takes_it_whole() -> None:
    scheduler = build(enable_chunked_prefill=False)
    scheduler.add(sequence_of("a", 10), sequence_of("b", 10))
    assert chunks(must_schedule(scheduler)) == [(0, 10)]
    second = must_schedule(scheduler)
    assert (chunks(second), second.num_tokens) == ([(1, 10)], 11)


def test_a_preempted_sequence_that_outgrew_a_step_is_chunked_all_the_same() -> None:
    scheduler = build(num_blocks=11, max_num_seqs=2, enable_chunked_prefill=False)
    old, new = (sequence_of(name, 14, max_tokens=18) for name in ("old", "new"))
    scheduler.add(old, new)
    preempted_at = 0
    while scheduler.has_work():
        step = must_schedule(scheduler)
        preempted_at = preempted_at or (new.state is SequenceState.PREEMPTED and new.num_known)
        assert step.num_tokens <= 16
        scheduler.apply(step, [5] * len(step.sampled))
    assert preempted_at > 16
    assert [len(old.output_token_ids), len(new.output_token_ids)] == [18, 18]


def test_a_newcomer_leaves_each_running_sequence_a_block_to_grow() -> None:
    scheduler = build(num_blocks=4, max_num_batched_tokens=64)
    scheduler.add(sequence_of("a", 4, max_tokens=4), sequence_of("b", 8, max_tokens=1))
    assert [sequence.sequence_id for sequence in must_schedule(scheduler).sampled] == ["a"], "b would take the last two of three blocks"


def test_nobody_overtakes_the_oldest_that_waits() -> None:
    scheduler = build(num_blocks=9, max_num_batched_tokens=64)
    scheduler.add(sequence_of("a", 16), sequence_of("large", 20), sequence_of("small", 2))
    step = must_schedule(scheduler)
    assert [sequence.sequence_id for sequence in step.sampled] == ["a"]
    scheduler.apply(step, [EOS])
    assert [sequence.sequence_id for sequence in must_schedule(scheduler).sampled] == ["large", "small"]


@pytest.mark.parametrize(
    ("settings", "num_prompt", "max_tokens", "message"),
    [
        ({}, 64, 1, "the prompt has 64 tokens, and max_model_len 64"),
        ({"enable_chunked_prefill": False}, 17, 1, "without chunked prefill a step takes 16"),
        ({"num_blocks": 5}, 10, 8, "17 tokens need KV where all blocks hold 16"),
    ],
    ids=["model length", "whole prompt", "pool"],
)
def test_what_can_never_run_is_refused(settings: dict[str, int], num_prompt: int, max_tokens: int, message: str) -> None:
    scheduler = build(**settings)
    with pytest.raises(RequestError, match=message) as caught:
        scheduler.add(sequence_of("fits", 1, max_tokens=1), sequence_of("a", num_prompt, max_tokens=max_tokens))
    assert caught.value.request_id == "request of a"
    assert not scheduler.has_work(), "all sequences of a request are queued, or none"


def test_a_sequence_that_just_fits_the_pool_runs_to_its_end() -> None:
    scheduler = build(num_blocks=5)
    sequence = sequence_of("a", 10, max_tokens=7, ignore_eos=True)
    scheduler.add(sequence)
    while scheduler.has_work():
        scheduler.apply(must_schedule(scheduler), [EOS])
    assert (len(sequence.output_token_ids), sequence.finish_reason) == (7, "length")


def test_a_full_queue_refuses() -> None:
    scheduler = build(max_waiting=1)
    scheduler.add(sequence_of("a", 1))
    with pytest.raises(RequestError, match="1 sequences are waiting, the limit max_waiting is 1"):
        scheduler.add(sequence_of("b", 1))


@pytest.mark.parametrize(
    ("params", "tokens", "expected"),
    [
        ({}, [5, EOS], ("stop", None)),
        ({"stop_token_ids": [9]}, [5, 9], ("stop", 9)),
        ({"ignore_eos": True, "max_tokens": 2}, [EOS, 5], ("length", None)),
        ({"min_tokens": 1}, [EOS, EOS], ("stop", None)),
        ({"max_tokens": 2}, [5, EOS], ("stop", None)),
    ],
    ids=["eos", "stop token", "eos ignored", "eos before min_tokens", "eos as the last token"],
)
def test_how_a_sequence_ends(params: dict[str, object], tokens: list[int], expected: tuple[str, int | None]) -> None:
    scheduler = build()
    sequence = sequence_of("a", 3, **params)
    scheduler.add(sequence)
    for token in tokens:
        assert not sequence.is_finished
        scheduler.apply(must_schedule(scheduler), [token])
    assert (sequence.finish_reason, sequence.stop_reason) == expected
    assert sequence.output_token_ids == tokens


@pytest.mark.parametrize(("min_tokens", "end_token_ids"), [(0, []), (2, [EOS, 9])], ids=["none", "min_tokens"])
def test_end_tokens_travel_only_with_min_tokens(min_tokens: int, end_token_ids: list[int]) -> None:
    scheduler = build()
    scheduler.add(sequence_of("a", 3, min_tokens=min_tokens, stop_token_ids=[9], logprobs=2, temperature=0.5, top_k=3))
    (add,) = must_schedule(scheduler).batch.adds
    assert (add.min_tokens, add.end_token_ids.tolist()) == (min_tokens, end_token_ids)
    assert (add.seed, add.logprobs, add.temperature, add.top_k) == (7, 2, 0.5, 3)


@pytest.mark.parametrize(("speculation", "num_shared"), [(None, 6), ("ngram", 5)], ids=["plain", "speculating"])
def test_an_end_that_no_rank_computes_is_not_shared(speculation: str | None, num_shared: int) -> None:
    """The step behind is published when the end comes back: without speculation ranks compute it, with it they know better."""
    scheduler = build(speculation=speculation, block_size=1, enable_prefix_cache=True)
    scheduler.add(sequence_of("a", 3))
    scheduler.apply(must_schedule(scheduler), [20])
    if speculation is None:
        scheduler.apply(must_schedule(scheduler), [21])
    ending, behind = must_schedule(scheduler), must_schedule(scheduler)
    scheduler.apply(ending, *([[21, EOS], [2], [1]] if speculation else [[EOS]]))
    scheduler.apply(behind, *([[], [0], [0]] if speculation else [[30]]))
    scheduler.add(Sequence("b", "the next turn", np.array([10, 11, 12, 20, 21, EOS, 30], np.int32), SamplingParams(max_tokens=4), seed=7))
    (add,) = must_schedule(scheduler).batch.adds
    assert add.num_computed == num_shared


@pytest.mark.parametrize(("ignore_eos", "end_token_ids"), [(False, [EOS, 9]), (True, [9])], ids=["eos", "ignore-eos"])
def test_end_tokens_travel_with_speculation_so_that_ranks_see_ends(ignore_eos: bool, end_token_ids: list[int]) -> None:
    scheduler = build(speculation="ngram")
    scheduler.add(sequence_of("a", 3, ignore_eos=ignore_eos, stop_token_ids=[9]))
    (add,) = must_schedule(scheduler).batch.adds
    assert add.end_token_ids.tolist() == end_token_ids


@pytest.mark.parametrize("num_steps", [0, 1, 2], ids=["waiting", "prompt", "decoding"])
def test_a_sequence_ends_from_outside_in_any_state(num_steps: int) -> None:
    scheduler = build(max_num_batched_tokens=4)
    sequence = sequence_of("a", 6)
    scheduler.add(sequence)
    steps = [must_schedule(scheduler) for _ in range(num_steps)]
    assert scheduler.finish("a", "stop", "\n\n")
    assert not scheduler.finish("a", "stop"), "it has finished"
    assert not scheduler.abort("nobody")
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", "\n\n")
    for step in steps:
        assert scheduler.apply(step, [5] * len(step.sampled)) == []
    assert not scheduler.has_work()
    assert scheduler.statistics().num_free_blocks == 63
    scheduler.validate()


def test_steps_are_applied_in_turn_and_whole() -> None:
    scheduler = build()
    scheduler.add(sequence_of("a", 3))
    first, second = must_schedule(scheduler), must_schedule(scheduler)
    with pytest.raises(InternalError, match="out of turn"):
        scheduler.apply(second, [5])
    with pytest.raises(InternalError, match="samples 1 rows came back with 2 tokens"):
        scheduler.apply(first, [5, 5])
    scheduler.apply(first, [5])
    with pytest.raises(InternalError, match="out of turn"):
        scheduler.apply(first, [5])


def test_an_id_in_use_is_refused() -> None:
    scheduler = build()
    scheduler.add(sequence_of("a", 3))
    with pytest.raises(InternalError, match="sequence a was added twice"):
        scheduler.add(sequence_of("a", 3))


def _lose_block(scheduler: Scheduler, sequence: Sequence) -> None:
    sequence.blocks.pop()


def _lose_slot(scheduler: Scheduler, sequence: Sequence) -> None:
    sequence.slot = 3


def _count_a_token_twice(scheduler: Scheduler, sequence: Sequence) -> None:
    sequence.num_tokens += 1


def _compute_ahead(scheduler: Scheduler, sequence: Sequence) -> None:
    sequence.num_computed = sequence.num_tokens


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_lose_block, "tables hold it"),
        (_lose_slot, "not each held or free once"),
        (_count_a_token_twice, "tokens in flight"),
        (_compute_ahead, "nobody has sampled"),
    ],
)
def test_validate_finds_damage(damage: Callable[[Scheduler, Sequence], None], message: str) -> None:
    scheduler = build()
    sequence = sequence_of("a", 3)
    scheduler.add(sequence)
    must_schedule(scheduler)
    damage(scheduler, sequence)
    with pytest.raises(InternalError, match=message):
        scheduler.validate()


def test_a_reset_keeps_what_was_applied_and_forgets_the_rest() -> None:
    scheduler = build(enable_prefix_cache=True)
    a, b = sequence_of("a", 5), sequence_of("b", 12)
    scheduler.add(a, b)
    first = must_schedule(scheduler)
    must_schedule(scheduler)
    scheduler.apply(first, [20])
    scheduler.reset()
    scheduler.validate()
    assert (a.num_known, a.num_tokens, a.num_in_flight, b.num_tokens) == (6, 6, 0, 12)
    statistics = scheduler.statistics()
    assert (statistics.num_running, statistics.num_waiting, statistics.num_steps_in_flight) == (0, 2, 0)
    assert (statistics.num_cached_blocks, statistics.num_free_blocks) == (0, statistics.num_blocks)
    assert (statistics.num_restarts, statistics.num_preemptions) == (1, 0)
    again = must_schedule(scheduler)
    assert (again.batch.deletes, chunks(again)) == ((), [(0, 6), (1, 10)])
    (add_a, add_b) = again.batch.adds
    assert (add_a.tokens.tolist(), add_a.num_prompt, add_a.num_computed) == ([*range(10, 15), 20], 5, 0)
    assert (add_b.num_prompt, add_b.num_computed) == (12, 0)


def test_only_some_requests_run_and_newcomers_wait() -> None:
    scheduler = build()
    a, b = sequence_of("a", 3), sequence_of("b", 3)
    scheduler.add(a)
    scheduler.add(b)
    scheduler.apply(must_schedule(scheduler), [20, 21])
    scheduler.run_only(["request of b"])
    scheduler.add(sequence_of("c", 3))
    alone = must_schedule(scheduler)
    assert (alone.sampled, sorted(alone.batch.deletes)) == ((b,), [0, 1])
    assert [add.tokens.tolist() for add in alone.batch.adds] == [[10, 11, 12, 21]]
    scheduler.run_only([])
    assert scheduler.schedule() is None
    scheduler.apply(alone, [22])
    scheduler.validate()
    scheduler.run_only(None)
    assert [sequence.sequence_id for sequence in must_schedule(scheduler).sampled] == ["a", "b", "c"]


def test_who_is_held_back_can_be_aborted() -> None:
    scheduler = build()
    scheduler.add(sequence_of("a", 3))
    scheduler.run_only([])
    assert scheduler.has_work()
    assert scheduler.abort("a")
    scheduler.validate()
    assert not scheduler.has_work()
