"""What a request gives where several tokens come at once: ends, stop texts and limits within a run of accepted drafts, and its figures.

The model's every output is known beforehand, and it is its own draft, so that all drafts are accepted.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.chain_model import CYCLE, EOS, TEXT, TOKENS, expected_tokens, save_chain_checkpoint, token_ids
from support.checkpoints import save_checkpoint
from support.engines import assert_idle, build_engine, collect, complete, complete_all, greedy, process_starts
from support.local_engine import LocalEngine, Request
from support.polling import wait_until

import zspmd
from zspmd.runtime.engine.detokenizer import Detokenizer
from zspmd.runtime.engine.streams import completion_seed
from zspmd.runtime.engine.tokenizer import Tokenizer
from zspmd.speculation_config import DraftConfig, SpeculationConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_MODEL_LEN = 64
K = 5  # runs of six tokens, of which neither the text nor a block of four is a multiple
PROMPT = "tell"
(COMMA,) = token_ids(",")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chain")
    save_chain_checkpoint(directory, max_position_embeddings=MAX_MODEL_LEN)
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(checkpoint: Path) -> AsyncIterator[zspmd.Engine]:
    """One engine for all tests of this file, which never has a step in flight of a sequence that has ended."""
    speculation = SpeculationConfig(DraftConfig(str(checkpoint), K), "fixed")
    async with build_engine(checkpoint, block_size=4, max_num_seqs=16, num_blocks=400, window=1, speculation=speculation) as running:
        yield running


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_is_held(engine: zspmd.Engine) -> AsyncIterator[None]:
    """After each test the engine holds no sequence and no block."""
    yield
    await wait_until(lambda: engine.statistics().num_steps_in_flight == 0)
    assert_idle(engine)


async def test_an_end_of_sequence_within_a_run_ends_the_request(engine: zspmd.Engine) -> None:
    outputs = await collect(engine, PROMPT, greedy())
    assert (outputs[-1].text, outputs[-1].token_ids) == (TEXT, CYCLE)
    assert (outputs[-1].finish_reason, outputs[-1].outputs[0].stop_reason) == ("stop", None)
    assert len(outputs) <= 1 + -(-len(CYCLE) // (K + 1)), "several tokens came at once"
    for earlier, later in itertools.pairwise(outputs):
        assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
        assert later.text.startswith(earlier.text)


async def test_a_limit_within_a_run_ends_the_request(engine: zspmd.Engine) -> None:
    limits = range(1, 30)
    outputs = await complete_all(engine, [PROMPT] * len(limits), [greedy(max_tokens=limit, ignore_eos=True) for limit in limits])
    for limit, output in zip(limits, outputs, strict=True):
        assert (output.token_ids, output.finish_reason) == (expected_tokens(limit), "length")


async def test_the_model_length_within_a_run_ends_the_request(engine: zspmd.Engine) -> None:
    prompts = [token_ids("x" * (MAX_MODEL_LEN - room)) for room in range(1, 14)]
    outputs = await complete_all(engine, prompts, greedy(ignore_eos=True))
    for room, output in enumerate(outputs, start=1):
        assert (output.token_ids, output.finish_reason) == (expected_tokens(room), "length")


@pytest.mark.parametrize("min_tokens", [0, 7])
@pytest.mark.parametrize("stop", ["你", ["zzz", ", 你"], [", ", ","], "H", "!", "😀!Hé", "!?"], ids=str)
async def test_a_stop_text_is_cut_wherever_runs_end(engine: zspmd.Engine, checkpoint: Path, stop: list[str] | str, min_tokens: int) -> None:
    """Prompts end within the text, at another place each, so that runs do too. Tokens that come one by one give what is wanted."""
    params = greedy(stop=stop, logprobs=1, min_tokens=min_tokens, max_tokens=33, ignore_eos=True)
    prompts = [token_ids("x") + TOKENS[:count] for count in range(len(TOKENS))]
    outputs = await complete_all(engine, prompts, params)
    tokenizer = Tokenizer.from_directory(checkpoint)
    for count, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        tokens, detokenizer = (CYCLE * 6)[count:][: params.max_tokens], Detokenizer(tokenizer, prompt, params)
        if min_tokens:  # the end of the text is not sampled so early: it begins again
            tokens = output.token_ids
        ends = (detokenizer.push([token], "length" if last else None) for last, token in mark_last(tokens))
        size, found = next(((size, end) for size, end in enumerate(ends, start=1) if end is not None), (len(tokens), None))
        assert (output.token_ids, output.text) == (tokens[:size], detokenizer.text)
        assert (output.finish_reason, output.outputs[0].stop_reason) == ("length" if found is None else "stop", found)
        assert output.outputs[0].logprobs is not None
        assert [entry.token_id for entry in output.outputs[0].logprobs] == output.token_ids


def mark_last(tokens: list[int]) -> Iterator[tuple[bool, int]]:
    return ((number == len(tokens), token) for number, token in enumerate(tokens, start=1))


async def test_a_stop_token_within_a_run_ends_the_request(engine: zspmd.Engine) -> None:
    output = await complete(engine, PROMPT, greedy(stop_token_ids=[99, COMMA]))
    assert (output.text, output.token_ids) == ("Hé", token_ids("Hé,"))
    assert (output.finish_reason, output.outputs[0].stop_reason) == ("stop", COMMA)


async def test_no_end_token_is_sampled_before_min_tokens(engine: zspmd.Engine) -> None:
    output = await complete(engine, PROMPT, greedy(min_tokens=20))
    assert len(output.token_ids) > 20
    assert [i for i, token in enumerate(output.token_ids) if token == EOS] == [len(output.token_ids) - 1]


@pytest.mark.parametrize("count", [0, 1, 20], ids=lambda count: f"logprobs-{count}")
async def test_each_token_of_a_run_has_its_logprobs(engine: zspmd.Engine, count: int) -> None:
    for output in await collect(engine, PROMPT, greedy(logprobs=count, max_tokens=23, ignore_eos=True)):
        assert output.outputs[0].logprobs is not None
        assert [entry.token_id for entry in output.outputs[0].logprobs] == output.token_ids
        for entry in output.outputs[0].logprobs:
            assert len(entry.top) == count
            assert -1e-3 < entry.logprob < 0
            assert count == 0 or next(iter(entry.top.items())) == (entry.token_id, entry.logprob)


async def test_several_completions_are_those_without_speculation(engine: zspmd.Engine, checkpoint: Path) -> None:
    params = zspmd.SamplingParams(n=4, temperature=10.0, seed=7, max_tokens=15, ignore_eos=True)
    output = await complete(engine, PROMPT, params)
    requests = [Request(token_ids(PROMPT), params, completion_seed(7, index)) for index in range(params.n)]
    plain = LocalEngine(checkpoint, zspmd.EngineConfig(max_num_seqs=4, num_blocks=100, block_size=4))
    wanted = [answer.token_ids for answer in plain.run(requests)]
    assert [completion.token_ids for completion in output.outputs] == wanted
    assert len({tuple(tokens) for tokens in wanted}) == params.n


async def test_figures_of_requests_add_up_to_the_engines(engine: zspmd.Engine) -> None:
    before = engine.statistics()
    params = [
        greedy(max_tokens=count, ignore_eos=True, n=1 + count % 3, seed=count, temperature=count % 2 * 10.0) for count in range(2, 30)
    ]
    outputs = await complete_all(engine, [PROMPT] * len(params), params)
    after = engine.statistics()
    assert before.speculation is not None
    assert after.speculation is not None
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    assert len(metrics) == len(outputs)
    drafted, accepted = (
        [new - old for new, old in zip(getattr(after.speculation, name), getattr(before.speculation, name), strict=True)]
        for name in ("drafted", "accepted")
    )
    assert sum(one.num_drafted for one in metrics) == sum(drafted) > 0
    assert sum(one.num_accepted for one in metrics) == sum(accepted) > 0
    assert drafted == sorted(drafted, reverse=True)
    assert accepted == sorted(accepted, reverse=True)
    assert all(0 <= kept <= tried for kept, tried in zip(accepted, drafted, strict=True))
    num_generated = after.num_generated_tokens - before.num_generated_tokens
    assert sum(one.num_steps + one.num_accepted for one in metrics) == num_generated
    assert num_generated == sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    assert after.num_discarded == before.num_discarded
    sure = [one for one, output in zip(metrics, params, strict=True) if output.temperature == 0]
    assert all(one.num_accepted == one.num_drafted for one in sure)
    assert max(one.mean_accepted_length for one in sure) > K - 1
    assert after.speculation.propose_s > before.speculation.propose_s
    assert after.speculation.target_s > before.speculation.target_s


async def test_an_abort_within_a_run_ends_the_iterator_with_what_there_is(engine: zspmd.Engine) -> None:
    params = greedy(max_tokens=MAX_MODEL_LEN - 10, ignore_eos=True)
    async for output in engine.generate(PROMPT, params, request_id="long"):
        if len(output.token_ids) >= 5 and not output.finished:
            assert engine.abort("long")
    assert output.finish_reason == "abort"
    assert output.token_ids == expected_tokens(len(output.token_ids))
    assert 5 <= len(output.token_ids) < params.max_tokens


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """A checkpoint of another vocabulary."""
    save_checkpoint(tmp_path)
    return tmp_path


async def test_a_draft_of_another_vocabulary_is_refused_before_a_process_starts(checkpoint: Path, others: Path) -> None:
    config: dict[str, Any] = {"speculation": f"draft:{others}"}
    with process_starts() as starts, pytest.raises(zspmd.CheckpointError, match="choose a draft with the target's vocabulary") as caught:
        async with build_engine(checkpoint, **config):
            pass
    assert str(others) in str(caught.value)
    assert not starts
