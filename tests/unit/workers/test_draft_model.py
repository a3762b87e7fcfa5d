"""What a draft model computes: nothing when it is not asked, once what it lacks, and no more than it may propose."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import SIZES, save_checkpoint
from support.local_engine import Answer, LocalEngine, Request

from zspmd.config import EngineConfig, SamplingParams
from zspmd.speculation_config import DraftConfig, NgramConfig, SpeculationConfig
from zspmd.workers.speculation.draft_model import DraftProposer

BLOCK_SIZE = 4
NUM_TOKENS = 24
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory)
    return directory


def build(directory: Path, proposer: DraftConfig, *, max_model_len: int = 96, **policy: Any) -> LocalEngine:
    speculation = SpeculationConfig(proposer, **{"policy": "fixed", **policy})
    config = EngineConfig(max_num_seqs=4, num_blocks=100, block_size=BLOCK_SIZE, window=1, speculation=speculation)
    return LocalEngine(directory, config, max_model_len=max_model_len)


def proposer_of(engine: LocalEngine) -> DraftProposer:
    assert engine.worker._speculator is not None
    proposer = engine.worker._speculator.proposer
    assert isinstance(proposer, DraftProposer)
    return proposer


def count_tokens(proposer: DraftProposer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that the tokens of each of the draft's passes are appended to."""
    counts, forward = list[int](), proposer._model.forward

    def counting(token_ids: Any, *others: Any) -> Any:
        counts.append(len(token_ids))
        return forward(token_ids, *others)

    monkeypatch.setattr(proposer._model, "forward", counting)
    return counts


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(SIZES["vocab_size"]), k=length)


def ask(engine: LocalEngine, tokens: list[int], count: int = NUM_TOKENS, seed: int = 0) -> Answer:
    return engine.run([Request(tokens, SamplingParams(max_tokens=count, **GREEDY), seed)])[0]


def test_it_computes_each_token_once_where_all_is_accepted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(checkpoint, DraftConfig(str(checkpoint), 3))
    counts = count_tokens(proposer_of(engine), monkeypatch)
    ask(engine, prompt(20), 21)
    assert counts[:4] == [20, 1, 1, 1], "the prompt in a chunk, then a pass a draft"
    assert set(counts[4:]) == {2, 1}, "later the last draft and the token behind it together"
    assert sum(counts) == 20 + 21 - 2, "not the last token, nor the one before it, which nothing is proposed behind"
    assert engine.num_accepted == engine.num_drafted == 15


def test_refused_drafts_are_computed_anew(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, seed=3)
    engine = build(checkpoint, DraftConfig(str(tmp_path), 4))
    counts = count_tokens(proposer_of(engine), monkeypatch)
    ask(engine, prompt(20), 12)
    assert engine.num_accepted == 0
    assert counts == [20, *[1] * 4 * 7, *[1] * 3, 1, 1, 1], "a step gains a token, and as many drafts as there is room for"


def test_without_depth_it_is_idle_and_catches_up_later(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second sequence takes the depth to 0 for a while: the first one's draft goes on where it stopped."""
    engine = build(checkpoint, DraftConfig(str(checkpoint), 2), policy="batch", depths=((1, 2), (2, 0)))
    plain = LocalEngine(checkpoint, EngineConfig(max_num_seqs=4, num_blocks=100, block_size=BLOCK_SIZE))
    counts = count_tokens(proposer_of(engine), monkeypatch)
    requests = [
        Request(prompt(9), SamplingParams(max_tokens=80, **GREEDY), 0),
        Request(prompt(5, 1), SamplingParams(max_tokens=25, **GREEDY), 1),
    ]
    answers = engine.run(requests, join_share=0.5)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain.run(requests)]
    first, last = engine.depths.index(2), len(engine.depths) - 1 - engine.depths[::-1].index(2)
    assert 0 in engine.depths[first:last], "it went and came back"
    assert max(counts[1:]) >= 20, "a chunk takes what was generated meanwhile"
    assert engine.num_accepted == engine.num_drafted > 20


def test_shared_blocks_are_not_computed_again(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(checkpoint, DraftConfig(str(checkpoint), 2))
    counts = count_tokens(proposer_of(engine), monkeypatch)
    shared = prompt(21)
    first = ask(engine, shared, 12)
    counts.clear()
    again = ask(engine, [*shared, 7, 8, 9], 12, seed=1)
    assert engine.scheduler.statistics().num_prefix_hits == 20
    assert counts[:2] == [5, 1], "the last of the shared prompt, its own three and the newest token in one row, then a pass for a draft"
    assert len(first.token_ids) == len(again.token_ids) == 12
    assert engine.num_accepted == engine.num_drafted


def test_blocks_that_it_never_computed_are_not_taken_for_whole(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sequence runs without drafts, and shares its blocks with one that has some."""
    engine = build(checkpoint, DraftConfig(str(checkpoint), 2))
    counts = count_tokens(proposer_of(engine), monkeypatch)
    shared = prompt(21)
    ask(engine, shared, 1)
    assert counts == []
    ask(engine, shared, 12, seed=1)
    assert engine.scheduler.statistics().num_prefix_hits == 20
    assert counts[:2] == [21, 1]
    assert engine.num_accepted == engine.num_drafted > 0


@pytest.mark.parametrize("context", [16, 24, 500])
def test_nothing_is_proposed_beyond_its_context(checkpoint: Path, tmp_path: Path, context: int) -> None:
    """Weights do not depend on the context, so that as long as it reaches all is accepted."""
    save_checkpoint(tmp_path, max_position_embeddings=context)
    engine = build(checkpoint, DraftConfig(str(tmp_path), 3), max_model_len=40)
    plain = LocalEngine(checkpoint, EngineConfig(max_num_seqs=4, num_blocks=100, block_size=BLOCK_SIZE), max_model_len=40)
    answer = ask(engine, prompt(10), 90)
    assert answer == ask(plain, prompt(10), 90)
    assert len(answer.token_ids) == 30, "the model's length ends it"
    assert engine.num_accepted == engine.num_drafted
    assert engine.num_drafted > (20 if context == 500 else 0)
    if context < 40:
        assert 0.6 * (context - 10) < engine.num_drafted <= context + 1 - 10


def inner_limits(outer: DraftProposer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that the most drafts of each proposal of the inner proposer are appended to."""
    assert outer._inner is not None
    limits, propose = list[int](), outer._inner.propose

    def noting(*args: Any) -> Any:
        counts = propose(*args)
        limits.append(int(counts.max()))
        return counts

    monkeypatch.setattr(outer._inner, "propose", noting)
    return limits


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(lambda directory: DraftConfig(str(directory), 2), id="a draft"),
        pytest.param(lambda directory: NgramConfig(2, min_n=1), id="n-grams"),
    ],
)
def test_a_proposer_within_proposes_no_more_than_its_own_k(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, inner: Callable[[Path], DraftConfig | NgramConfig]
) -> None:
    engine = build(checkpoint, DraftConfig(str(checkpoint), 7, inner=inner(checkpoint)))
    limits = inner_limits(proposer_of(engine), monkeypatch)
    ask(engine, prompt(10) * 2, 60)
    assert max(limits) == 2
    assert engine.num_accepted == engine.num_drafted


def test_a_draft_within_saves_passes_of_the_outer_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = build(checkpoint, DraftConfig(str(checkpoint), 6))
    nested = build(checkpoint, DraftConfig(str(checkpoint), 6, inner=DraftConfig(str(checkpoint), 6)))
    passes = []
    for engine in (alone, nested):
        counts = count_tokens(proposer_of(engine), monkeypatch)
        ask(engine, prompt(10), 50)
        passes.append(len(counts))
        assert engine.num_accepted == engine.num_drafted
    assert passes[1] < passes[0] / 3
