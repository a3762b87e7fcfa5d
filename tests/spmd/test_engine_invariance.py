"""A request's tokens do not depend on what runs beside it, nor on how the scheduler cuts the work up."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import SIZES, save_checkpoint
from support.compared_requests import WAYS_TO_SAMPLE
from support.engines import assert_idle, build_engine, complete, complete_all

import zspmd
from zspmd.runtime.engine.statistics import SchedulerStatistics

NUM_REQUESTS = 32
MAX_TOKENS = 14
BLOCK_SIZE = 4
CACHED_PROMPT_TOKENS = 16  # of every second prompt, the same for all of these: four blocks


@dataclass(frozen=True)
class Requests:
    prompts: list[list[int]]
    params: list[zspmd.SamplingParams]
    ways: list[str]


@dataclass(frozen=True)
class Layout:
    """How an engine cuts the work up, and what its statistics must show for the test to mean anything.

    ``num_rounds`` is how often all requests are sent: the second time, their beginnings are known.
    """

    config: dict[str, Any]
    num_rounds: int = 1
    has_prefix_hits: bool = False
    has_preemptions: bool = False
    has_chunks: bool = False


@dataclass(frozen=True)
class Run:
    """The tokens that an engine gave: of each round, and of some requests alone; and what it had counted after the rounds."""

    rounds: list[list[list[int]]]
    alone: list[list[int]]
    statistics: SchedulerStatistics
    num_steps: int


SMALL_POOL = 40  # blocks; the largest request has 40 + 14 tokens and takes 14
LAYOUTS = {
    "whole-prompts-window-1": Layout({"enable_chunked_prefill": False, "enable_prefix_cache": False, "window": 1}),
    "chunks": Layout({"max_num_batched_tokens": 32, "enable_prefix_cache": False}, has_chunks=True),
    "prefix-reuse": Layout({"enable_chunked_prefill": False}, num_rounds=2, has_prefix_hits=True),
    "preemption-window-1": Layout({"num_blocks": SMALL_POOL, "enable_prefix_cache": False, "window": 1}, has_preemptions=True),
    "everything-window-2": Layout(
        {"num_blocks": SMALL_POOL, "max_num_batched_tokens": 32, "window": 2},
        has_prefix_hits=True,
        has_preemptions=True,
        has_chunks=True,
    ),
}
QUICK = ("whole-prompts-window-1", "everything-window-2")  # the rest do one part of the latter each
RANKS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))  # tp, pp, dp
ALONE = (0, 3, 7, 18, 31)


def make_requests() -> Requests:
    chance = random.Random(11)
    shared = [chance.randrange(SIZES["vocab_size"]) for _ in range(CACHED_PROMPT_TOKENS)]
    prompts = []
    for index in range(NUM_REQUESTS):
        own = [chance.randrange(SIZES["vocab_size"]) for _ in range(chance.randint(1, 24))]
        prompts.append(shared + own if index % 2 else own)
    ways = [list(WAYS_TO_SAMPLE)[index * len(WAYS_TO_SAMPLE) // NUM_REQUESTS] for index in range(NUM_REQUESTS)]
    params = [
        zspmd.SamplingParams(max_tokens=MAX_TOKENS, seed=1000 + index, ignore_eos=True, **WAYS_TO_SAMPLE[way])
        for index, way in enumerate(ways)
    ]
    return Requests(prompts, params, ways)


REQUESTS = make_requests()


@pytest.fixture(scope="module", params=["llama", "dots1", pytest.param("deepseek-v3", marks=pytest.mark.long)])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, a mixture of experts, which sorts its tokens by expert, everybody's among everybody's, and one that caches latents."""
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory, request.param)
    return directory


@pytest.fixture(scope="module")
def tokens_alone(checkpoint: Path) -> list[list[int]]:
    """Each request by itself, in one process, with nothing clever switched on."""

    async def run() -> list[list[int]]:
        simple = LAYOUTS["whole-prompts-window-1"].config
        async with build_engine(checkpoint, block_size=BLOCK_SIZE, max_num_seqs=NUM_REQUESTS, **simple) as engine:
            return [(await complete(engine, prompt, one)).token_ids for prompt, one in zip(REQUESTS.prompts, REQUESTS.params)]

    return asyncio.run(run())


async def run_layout(directory: Path, layout: Layout, ranks: tuple[int, int, int]) -> Run:
    tp, pp, dp = ranks
    async with build_engine(directory, tp=tp, pp=pp, dp=dp, block_size=BLOCK_SIZE, max_num_seqs=NUM_REQUESTS, **layout.config) as engine:
        rounds = [await complete_all(engine, REQUESTS.prompts, REQUESTS.params) for _ in range(layout.num_rounds)]
        statistics, num_steps = engine.statistics(), engine.group.statistics().steps
        assert sum(one.num_generated_tokens for one in engine.replica_statistics()) == statistics.num_generated_tokens
        assert len(engine.replica_statistics()) == dp
        alone = [(await complete(engine, REQUESTS.prompts[i], REQUESTS.params[i])).token_ids for i in ALONE]
        assert_idle(engine)
    return Run([[output.token_ids for output in outputs] for outputs in rounds], alone, statistics, num_steps)


async def run_layouts(directory: Path, layout: Layout) -> dict[tuple[int, int, int], Run]:
    return dict(zip(RANKS, await asyncio.gather(*(run_layout(directory, layout, ranks) for ranks in RANKS))))


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.long) for name in LAYOUTS])
def runs(request: pytest.FixtureRequest, checkpoint: Path) -> tuple[Layout, dict[tuple[int, int, int], Run]]:
    """Start the engines of a layout together: each spends most of its time importing torch on one core."""
    layout = LAYOUTS[request.param]
    return layout, asyncio.run(run_layouts(checkpoint, layout))


def test_the_requests_are_worth_comparing(tokens_alone: list[list[int]]) -> None:
    assert all(len(tokens) == MAX_TOKENS for tokens in tokens_alone)
    assert len({tuple(tokens) for tokens in tokens_alone}) == NUM_REQUESTS
    assert set(REQUESTS.ways) == set(WAYS_TO_SAMPLE)


@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: "tp{} pp{} dp{}".format(*ranks))
def test_tokens_are_the_same_alone_and_among_31_others(
    runs: tuple[Layout, dict[tuple[int, int, int], Run]], tokens_alone: list[list[int]], ranks: tuple[int, int, int]
) -> None:
    run = runs[1][ranks]
    for tokens in run.rounds:
        different = [REQUESTS.ways[i] for i in range(NUM_REQUESTS) if tokens[i] != tokens_alone[i]]
        assert not different, f"{len(different)} of {NUM_REQUESTS} requests gave other tokens together: {different}"
    assert run.alone == [tokens_alone[i] for i in ALONE]


@pytest.mark.parametrize("ranks", RANKS, ids=lambda ranks: "tp{} pp{} dp{}".format(*ranks))
def test_the_layout_did_what_it_is_for(runs: tuple[Layout, dict[tuple[int, int, int], Run]], ranks: tuple[int, int, int]) -> None:
    layout, run = runs[0], runs[1][ranks]
    assert (run.statistics.num_prefix_hits > 0) == layout.has_prefix_hits
    assert (run.statistics.num_preemptions > 0) == layout.has_preemptions
    if layout.has_chunks or layout.has_preemptions or ranks[1:] != (1, 1):  # stages and replicas share the requests
        assert run.num_steps > MAX_TOKENS
    else:
        assert run.num_steps == layout.num_rounds * MAX_TOKENS  # all prompts in one step
    if layout.num_rounds == 2 and ranks[2] == 1:  # all full blocks of the prompts, but for a last token that must be computed
        assert run.statistics.num_prefix_hits == sum((len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE for prompt in REQUESTS.prompts)
