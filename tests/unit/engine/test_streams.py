"""RequestStream: what its consumer sees, without an engine."""

from __future__ import annotations

import asyncio

import pytest

from zspmd.config import SamplingParams
from zspmd.errors import RequestError, WorkerExitedError
from zspmd.runtime.engine.outputs import RequestOutput, TokenLogprob
from zspmd.runtime.engine.request import SequenceState
from zspmd.runtime.engine.streams import Completion, RequestStream, build_stream, completion_seed
from zspmd.runtime.engine.tokenizer import Tokenizer

HELLO = "Hello"


def build(tokenizer: Tokenizer | None = None, prompt: str = "Say:", **params: object) -> RequestStream:
    tokens = [1, 2, 3] if tokenizer is None else tokenizer.encode(prompt)
    return build_stream("r", prompt, tokens, SamplingParams(**params), 7, tokenizer)  # type: ignore[arg-type]  # checked by the class


def give(stream: RequestStream, tokens: list[int], finish_reason: str | None = None, index: int = 0) -> str | None:
    """Do to a completion what the scheduler and the engine do when tokens come back; returns the stop text."""
    completion = stream.completions[index]
    completion.sequence.output_token_ids += tokens
    stop = completion.push(tokens, finish_reason)
    if finish_reason is not None:
        finish(completion, finish_reason)
    stream.notify()
    return stop


def finish(completion: Completion, reason: str) -> None:
    completion.sequence.state = SequenceState.FINISHED
    completion.sequence.finish_reason = reason


async def test_an_output_holds_everything_since_the_beginning() -> None:
    stream = build()
    give(stream, [5])
    first = await stream.next_output()
    give(stream, [6, 7], "length")
    second = await stream.next_output()
    assert isinstance(first, RequestOutput)
    assert (first.token_ids, first.finished, first.finish_reason) == ([5], False, None), "an output does not change later"
    assert (second.token_ids, second.finished, second.finish_reason) == ([5, 6, 7], True, "length")
    assert (second.prompt, second.prompt_token_ids, second.text) == ("Say:", [1, 2, 3], "")


async def test_the_consumer_waits_for_a_change() -> None:
    stream = build()
    waiting = asyncio.create_task(stream.next_output())
    await asyncio.sleep(0)
    assert not waiting.done()
    give(stream, [5])
    assert (await waiting).token_ids == [5]


async def test_changes_between_two_looks_are_one_output() -> None:
    stream = build()
    for token in (5, 6, 7):
        give(stream, [token])
    assert (await stream.next_output()).token_ids == [5, 6, 7]
    waiting = asyncio.create_task(stream.next_output())
    await asyncio.sleep(0)
    assert not waiting.done(), "nothing is said twice"
    waiting.cancel()


async def test_a_failure_goes_before_what_has_come(byte_level: Tokenizer) -> None:
    stream = build(byte_level)
    give(stream, byte_level.encode(HELLO)[1:2])
    error = WorkerExitedError(exit_code=7, rank=1)
    stream.fail(error)
    with pytest.raises(WorkerExitedError) as caught:
        await stream.next_output()
    assert caught.value is error


async def test_a_failure_takes_nothing_from_a_request_that_has_ended() -> None:
    stream = build()
    give(stream, [5, 6], "length")
    stream.fail(WorkerExitedError(exit_code=7, rank=1))
    output = await stream.next_output()
    assert (output.token_ids, output.finished) == ([5, 6], True)


async def test_the_first_failure_is_the_one_that_counts() -> None:
    stream, error = build(), RequestError("it ended its workers", request_id="r")
    stream.fail(error)
    stream.fail(WorkerExitedError(exit_code=7, rank=1))
    with pytest.raises(RequestError) as caught:
        await stream.next_output()
    assert caught.value is error


async def test_one_error_for_many_consumers_does_not_pile_up_tracebacks() -> None:
    error = WorkerExitedError(exit_code=7, rank=1)
    lengths = []
    for _ in range(3):
        stream = build()
        stream.fail(error)
        with pytest.raises(WorkerExitedError):
            await stream.next_output()
        lengths.append(traceback_length(error))
    assert lengths[0] == lengths[2]


def traceback_length(error: BaseException) -> int:
    length, trace = 0, error.__traceback__
    while trace is not None:
        length, trace = length + 1, trace.tb_next
    return length


async def test_text_and_stop_come_from_the_tokens(byte_level: Tokenizer) -> None:
    stream = build(byte_level, stop="lo")
    tokens = byte_level.encode(HELLO)[1:]
    stops = [give(stream, [token]) for token in tokens]
    assert (await stream.next_output()).text == "Hel"
    assert stops[-1] == "lo"
    assert set(stops[:-1]) <= {None}


async def test_a_request_is_finished_when_all_its_completions_are() -> None:
    stream = build(n=2)
    give(stream, [5], "stop", index=1)
    output = await stream.next_output()
    assert (output.finished, stream.is_finished) == (False, False)
    assert [completion.finish_reason for completion in output.outputs] == [None, "stop"]
    give(stream, [6], "length", index=0)
    assert (await stream.next_output()).finished
    assert stream.is_finished


@pytest.mark.parametrize("asked", [None, 0, 2], ids=["not asked", "sampled only", "two"])
async def test_logprobs_are_none_unless_asked_for(asked: int | None) -> None:
    stream = build(logprobs=asked)
    entry = TokenLogprob(5, -0.5, {})
    stream.completions[0].logprobs += [] if asked is None else [entry]
    stream.completions[0].push([5], None)
    stream.notify()
    assert (await stream.next_output()).outputs[0].logprobs == (None if asked is None else [entry])


def test_completions_have_their_own_names_seeds_and_detokenizers(byte_level: Tokenizer) -> None:
    completions = build(byte_level, n=3).completions
    assert [(c.sequence.sequence_id, c.sequence.request_id, c.sequence.index) for c in completions] == [
        ("r/0", "r", 0),
        ("r/1", "r", 1),
        ("r/2", "r", 2),
    ]
    assert len({c.sequence.seed for c in completions}) == len({id(c.detokenizer) for c in completions}) == 3


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_seeds_of_completions_are_fixed_different_and_in_range(seed: int) -> None:
    seeds = [completion_seed(seed, index) for index in range(128)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 128
    assert all(0 <= one < 2**63 for one in seeds)
    assert completion_seed(7, 1) == 1_087_474_080_824_366_186, "recorded runs depend on it"


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one token"):
        build_stream("r", None, [], SamplingParams(), 0, None)
