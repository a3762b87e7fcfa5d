"""What a request gives: text, ends, chats, several completions, aborts, and two hundred of them at once, over two ranks."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from support.chain_model import CYCLE, EOS, TEXT, TOKENS, expected_tokens, save_chain_checkpoint, token_ids
from support.engines import assert_idle, build_engine, collect, complete, complete_all, greedy
from support.leaks import LeakCheck
from support.polling import wait_until

import zspmd
from zspmd.runtime.engine.tokenizer import Tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_MODEL_LEN = 256
NUM_SLOTS = 16
PROMPT = "tell"
(COMMA,) = token_ids(",")
GREEDY = zspmd.SamplingParams(max_tokens=40, temperature=0)
ENDLESS = zspmd.SamplingParams(max_tokens=200, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chain")
    save_chain_checkpoint(directory, max_position_embeddings=MAX_MODEL_LEN)
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(checkpoint: Path) -> AsyncIterator[zspmd.Engine]:
    """One engine for all tests of this file; when it has closed, nothing may be left of it."""
    with LeakCheck() as leaks:
        async with build_engine(checkpoint, tp=2, block_size=4, max_num_seqs=NUM_SLOTS, num_blocks=400) as running:
            yield running
        leaks.check()


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_is_held(engine: zspmd.Engine) -> AsyncIterator[None]:
    """After each test the engine holds no sequence and no block."""
    yield
    await wait_until(lambda: engine.statistics().num_steps_in_flight == 0)
    assert_idle(engine)


async def test_a_text_prompt_gives_text_up_to_the_end_of_sequence(engine: zspmd.Engine) -> None:
    output = await complete(engine, PROMPT, GREEDY, request_id="mine")
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("mine", PROMPT, token_ids(PROMPT))
    assert (output.text, output.token_ids) == (TEXT, CYCLE)
    assert (output.finish_reason, output.outputs[0].stop_reason, output.finished) == ("stop", None, True)


async def test_outputs_are_cumulative_and_never_split_a_character(engine: zspmd.Engine) -> None:
    outputs = await collect(engine, PROMPT, GREEDY)
    assert len(outputs) >= 3, "it was streamed"
    for earlier, later in itertools.pairwise(outputs):
        assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
        assert not earlier.finished
    for output in outputs:
        whole = [text for text in (TEXT[:end] for end in range(len(TEXT) + 1)) if len(token_ids(text)) <= len(output.token_ids)]
        assert output.text == whole[-1]


async def test_half_a_character_is_shown_only_when_the_request_ends_in_it(engine: zspmd.Engine) -> None:
    *streamed, last = await collect(engine, PROMPT, greedy(max_tokens=len("Hé, 你".encode()) + 2))
    assert all("\ufffd" not in output.text for output in streamed)
    assert (last.text, last.finish_reason) == ("Hé, 你\ufffd", "length")


async def test_a_slow_consumer_misses_nothing(engine: zspmd.Engine) -> None:
    stream = engine.generate(PROMPT, GREEDY)
    first = await stream.__anext__()
    await wait_until(lambda: engine.statistics().num_running == 0)
    rest = [output async for output in stream]
    assert len(first.token_ids) < len(CYCLE)
    assert [output.token_ids for output in rest] == [CYCLE]


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        pytest.param("你", "Hé, ", "你", id="a character of three tokens"),
        pytest.param("😀", "Hé, 你", "😀", id="a character of four tokens"),
        pytest.param(["zzz", ", 你"], "Hé", ", 你", id="one of two, over several tokens"),
        pytest.param([", ", ","], "Hé", ",", id="the first to be complete"),
        pytest.param("H", "", "H", id="the very first token"),
        pytest.param("!", "Hé, 你😀", "!", id="the last before the end of sequence"),
        pytest.param("!?", TEXT, None, id="begins and never ends"),
    ],
)
async def test_a_stop_text_is_cut_from_the_text(engine: zspmd.Engine, stop: list[str] | str, text: str, reason: str | None) -> None:
    outputs = await collect(engine, PROMPT, greedy(stop=stop))
    assert all(text.startswith(output.text) for output in outputs)
    last = outputs[-1]
    assert (last.text, last.finish_reason, last.outputs[0].stop_reason) == (text, "stop", reason)
    assert last.token_ids == (CYCLE if reason is None else token_ids(text + reason))


async def test_a_stop_token_stays_in_the_tokens_and_out_of_the_text(engine: zspmd.Engine) -> None:
    output = await complete(engine, PROMPT, greedy(stop_token_ids=[99, COMMA]))
    assert (output.text, output.token_ids) == ("Hé", token_ids("Hé,"))
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", COMMA)


async def test_ignore_eos_goes_on_to_max_tokens(engine: zspmd.Engine) -> None:
    output = await complete(engine, PROMPT, greedy(ignore_eos=True, max_tokens=30))
    assert (output.token_ids, output.finish_reason) == (expected_tokens(30), "length")
    assert output.text == TEXT + TEXT + "H\ufffd"


async def test_no_end_token_is_sampled_before_min_tokens(engine: zspmd.Engine) -> None:
    output = await complete(engine, PROMPT, greedy(min_tokens=20))
    assert output.token_ids[: len(TOKENS)] == TOKENS
    assert len(output.token_ids) > 20
    assert [i for i, token in enumerate(output.token_ids) if token == EOS] == [len(output.token_ids) - 1]
    assert output.finish_reason == "stop"


async def test_a_stop_text_does_not_count_before_min_tokens(engine: zspmd.Engine) -> None:
    output = await complete(engine, PROMPT, greedy(min_tokens=5, stop="é", ignore_eos=True))
    assert (output.text, output.finish_reason) == (TEXT + "H", "stop")


async def test_the_model_length_ends_a_request(engine: zspmd.Engine) -> None:
    output = await complete(engine, token_ids("x" * (MAX_MODEL_LEN - 5)), greedy(max_tokens=40, ignore_eos=True))
    assert (output.token_ids, output.finish_reason) == (expected_tokens(5), "length")


async def test_several_completions_are_independent_and_repeat_with_the_seed(engine: zspmd.Engine) -> None:
    params = {"temperature": 10.0, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    three, again, one = await asyncio.gather(*(complete(engine, PROMPT, greedy(n=n, **params)) for n in (3, 3, 1)))
    assert [completion.index for completion in three.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in three.outputs}) == 3
    assert three.outputs == again.outputs
    assert three.outputs[0] == one.outputs[0]


async def test_a_request_of_several_completions_ends_with_the_last_of_them(engine: zspmd.Engine) -> None:
    outputs = await collect(engine, PROMPT, greedy(n=4, temperature=6.0, seed=3, max_tokens=60, stop_token_ids=list(range(32, 127))))
    assert len({len(completion.token_ids) for completion in outputs[-1].outputs}) > 1, "they end at different steps"
    for output in outputs:
        assert output.finished == all(completion.finish_reason is not None for completion in output.outputs)
    assert [output.finished for output in outputs].index(True) == len(outputs) - 1


async def test_requests_without_a_seed_differ(engine: zspmd.Engine) -> None:
    params = zspmd.SamplingParams(max_tokens=12, temperature=10.0, ignore_eos=True)
    one, two = await complete_all(engine, [PROMPT] * 2, params)
    assert one.token_ids != two.token_ids


@pytest.mark.parametrize("count", [None, 0, 1, 20], ids=lambda count: f"logprobs-{count}")
async def test_logprobs_come_as_asked(engine: zspmd.Engine, count: int | None) -> None:
    outputs = await collect(engine, PROMPT, greedy(logprobs=count, max_tokens=6))
    if count is None:
        assert all(output.outputs[0].logprobs is None for output in outputs)
        return
    for output in outputs:
        assert output.outputs[0].logprobs is not None
        assert [entry.token_id for entry in output.outputs[0].logprobs] == output.token_ids
        for entry in output.outputs[0].logprobs:
            values = list(entry.top.values())
            assert len(values) == count
            assert values == sorted(values, reverse=True)
            assert -1e-3 < entry.logprob < 0
            assert count == 0 or next(iter(entry.top.items())) == (entry.token_id, entry.logprob)


async def test_requests_with_and_without_logprobs_share_a_batch(engine: zspmd.Engine) -> None:
    asked = [None, 3, None, 1, 0, None]
    outputs = await complete_all(engine, [PROMPT] * len(asked), [greedy(logprobs=count) for count in asked])
    assert [output.text for output in outputs] == [TEXT] * len(asked)
    for output, count in zip(outputs, asked):
        entries = output.outputs[0].logprobs
        assert (None if entries is None else [len(entry.top) for entry in entries]) == (None if count is None else [count] * len(CYCLE))


async def test_chat_messages_go_through_the_template(engine: zspmd.Engine, checkpoint: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüß"}]
    output = await complete(engine, messages, GREEDY)
    assert output.prompt == "<s>system: Be brief.</s><s>user: Grüß</s><s>assistant:"
    assert output.prompt_token_ids == Tokenizer.from_directory(checkpoint).encode(output.prompt, add_special_tokens=False)
    assert output.prompt_token_ids.count(256) == 3, "special tokens are tokens, not text"
    assert output.text == TEXT


async def test_token_ids_are_taken_as_they_are(engine: zspmd.Engine) -> None:
    output = await complete(engine, [256, *TOKENS[:3]], GREEDY)
    assert (output.prompt, output.prompt_token_ids) == (None, [256, *TOKENS[:3]])
    assert output.token_ids == CYCLE[3:]


async def test_abort_ends_the_iterator_with_what_there_is(engine: zspmd.Engine) -> None:
    assert engine.abort("nobody") is False
    outputs = []
    async for output in engine.generate(PROMPT, ENDLESS, request_id="long"):
        outputs.append(output)
        if len(output.token_ids) >= 5 and not output.finished:
            assert engine.abort("long")
            assert not engine.abort("long"), "it has ended"
    assert (outputs[-1].finished, outputs[-1].finish_reason) == (True, "abort")
    assert 5 <= len(outputs[-1].token_ids) < ENDLESS.max_tokens
    assert outputs[-1].text.startswith("Hé, ")


async def test_abort_brings_out_text_that_was_held_back(engine: zspmd.Engine, checkpoint: Path) -> None:
    params = greedy(stop=TEXT + TEXT + "?", ignore_eos=True, max_tokens=200)
    async for output in engine.generate(PROMPT, params, request_id="held"):
        if not output.finished and 3 <= len(output.token_ids) < 20:
            assert output.text == ""
            engine.abort("held")
    assert output.finish_reason == "abort"
    assert output.text == Tokenizer.from_directory(checkpoint).decode(output.token_ids)


async def test_leaving_the_loop_aborts(engine: zspmd.Engine) -> None:
    async for output in engine.generate(PROMPT, ENDLESS, request_id="left"):
        if len(output.token_ids) >= 3:
            break
    await wait_until(lambda: engine.statistics().num_running == 0)
    assert (await complete(engine, PROMPT, GREEDY, request_id="left")).text == TEXT, "its name is free again"


async def test_cancelling_the_task_aborts(engine: zspmd.Engine) -> None:
    task = asyncio.create_task(complete(engine, PROMPT, ENDLESS))
    await wait_until(lambda: engine.statistics().num_running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.statistics().num_running == 0


async def test_a_name_in_use_is_refused_and_free_afterwards(engine: zspmd.Engine) -> None:
    async for _ in engine.generate(PROMPT, GREEDY, request_id="twice"):
        with pytest.raises(zspmd.RequestError, match="request id 'twice' is in use; choose another") as caught:
            await complete(engine, PROMPT, GREEDY, request_id="twice")
        assert caught.value.request_id == "twice"
    assert (await complete(engine, PROMPT, GREEDY, request_id="twice")).text == TEXT


async def test_two_hundred_requests_with_random_aborts_all_end(engine: zspmd.Engine) -> None:
    chance = random.Random(2)
    ends = await asyncio.gather(*(live_through(engine, index, chance) for index in range(200)))
    assert set(ends) == {"finished", "left", "cancelled", "aborted"}
    assert min(ends.count(end) for end in set(ends)) > 10, f"a lopsided choice of ends: { {end: ends.count(end) for end in set(ends)} }"


async def live_through(engine: zspmd.Engine, index: int, chance: random.Random) -> str:
    """Send one request and end it somehow; returns how, after checking that what came is right."""
    prompt = token_ids("".join(chance.choices("abcdefg", k=chance.randint(1, 60))))
    params = greedy(max_tokens=chance.randint(1, 40), ignore_eos=True)
    name = f"soak-{index}"
    wish = chance.choice(["finish", "finish", "leave", "cancel", "abort"])
    after = chance.randint(1, params.max_tokens)
    if wish == "cancel":
        return await run_and_cancel(engine, prompt, params, name, at_total=chance.randint(0, 2000))
    async for output in engine.generate(prompt, params, request_id=name):
        assert output.token_ids == expected_tokens(len(output.token_ids))
        if wish == "leave" and len(output.token_ids) >= after:
            return "left"
        if wish == "abort" and len(output.token_ids) >= after and not output.finished:
            assert engine.abort(name)
    assert output.finished
    if output.finish_reason == "abort":
        assert after <= len(output.token_ids) < params.max_tokens
        return "aborted"
    assert (output.finish_reason, len(output.token_ids)) == ("length", params.max_tokens)
    return "finished"


async def run_and_cancel(engine: zspmd.Engine, prompt: list[int], params: zspmd.SamplingParams, name: str, *, at_total: int) -> str:
    """Cancel a request's task when all requests together have so many tokens: while it waits for a slot, runs, or has finished."""
    before = engine.statistics().num_generated_tokens
    task = asyncio.create_task(complete(engine, prompt, params, request_id=name))
    await wait_until(lambda: task.done() or engine.statistics().num_generated_tokens - before >= at_total, 30)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
        return "finished"
    return "cancelled"
