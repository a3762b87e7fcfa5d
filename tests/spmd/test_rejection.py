"""Rejection sampling through the engine: thousands of seeded draws have the distribution that Transformers computes, and plain draws have.

The histogram is of the second and third token after one prompt. With K 3 a round of drafts decides the second to the fifth: accepted
drafts, what takes the place of rejected ones, and tokens behind the last draft are all in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_checkpoint, save_tokenizer
from support.chi_square import chi_square_p, same_source_p
from support.drawn_tokens import draw_tokens, pair_distribution
from support.engines import assert_idle, build_engine, complete_all
from support.speculated_chains import count_pairs
from torch import Tensor

import zspmd

VOCAB = 16
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "eos_token_id": None,
}
PROMPT = [3, 1, 4, 1, 5, 9]
NUM_DRAWS = 20_000
K = 3
LEAST_P = 0.001
FILTERS: dict[str, dict[str, Any]] = {
    "cool": {"temperature": 0.6, "top_k": 12, "top_p": 0.95},
    "warm": {"temperature": 1.0, "top_k": 10, "top_p": 0.9},
    "hot": {"temperature": 1.6, "top_k": 13, "top_p": 0.8},
}
LONG = pytest.mark.long

torch.set_num_threads(1)


@dataclass
class Checkpoints:
    """A target and a draft that have nothing in common but their vocabulary, and Transformers' model of the target."""

    directory: Path
    model: Any

    @property
    def target(self) -> Path:
        return self.directory / "target"

    def speculation(self, name: str) -> zspmd.SpeculationConfig:
        """Return "ngram", "draft", "draft+ngram", or "draft:tp=2", with K 3 always and rejection sampling."""
        draft = str(self.directory / "draft")
        proposers: dict[str, zspmd.NgramConfig | zspmd.DraftConfig] = {
            "ngram": zspmd.NgramConfig(K, 1),
            "draft": zspmd.DraftConfig(draft, K),
            "draft+ngram": zspmd.DraftConfig(draft, K, inner=zspmd.NgramConfig(2, 1)),
            "draft:tp=2": zspmd.DraftConfig(draft, K, tp=2),
        }
        return zspmd.SpeculationConfig(proposers[name], policy="fixed", verify="rejection")

    def engine(self, speculation: zspmd.SpeculationConfig | None, **options: Any) -> zspmd.Engine:
        sizes = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192, "max_model_len": 32, "num_blocks": 4096, "max_waiting": 1 << 15}
        return build_engine(self.target, speculation=speculation, **{**sizes, **options})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    directory = tmp_path_factory.mktemp("rejection")
    save_checkpoint(directory / "draft", seed=2, vocab_size=VOCAB, **SIZES)
    return Checkpoints(directory, save_checkpoint(directory / "target", seed=1, vocab_size=VOCAB, **SIZES))


async def draw(engine: zspmd.Engine, filters: str, *, num_tokens: int = 2 + K, first_seed: int = 0) -> Tensor:
    return await draw_tokens(engine, PROMPT, NUM_DRAWS, first_seed=first_seed, max_tokens=num_tokens, **FILTERS[filters])


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    """Hold what is drawn without speculation; filled by ``plain_draws``."""
    return {}


async def plain_draws(checkpoints: Checkpoints, plain: dict[str, Tensor], filters: str) -> Tensor:
    """Return three tokens of each draw, by other seeds than those of ``draw``."""
    if filters not in plain:
        async with checkpoints.engine(None) as engine:
            plain[filters] = await draw(engine, filters, num_tokens=3, first_seed=1 << 20)
    return plain[filters]


def distance_p(checkpoints: Checkpoints, tokens: Tensor, filters: str) -> float:
    """Return how likely draws of the second and third token are, if they are the model's."""
    with torch.inference_mode():
        wanted = pair_distribution(checkpoints.model, PROMPT, 1, **FILTERS[filters])
    return chi_square_p(count_pairs(tokens, 1, VOCAB), wanted)


CASES = [
    pytest.param("draft", "warm", 1),
    *(pytest.param("draft", filters, 1, marks=LONG) for filters in ("cool", "hot")),
    pytest.param("ngram", "warm", 1),
    *(pytest.param("ngram", filters, 1, marks=LONG) for filters in ("cool", "hot")),
    *(pytest.param("draft+ngram", filters, 1, marks=LONG) for filters in FILTERS),
    *(pytest.param(proposer, "warm", 2, marks=LONG) for proposer in ("draft", "draft:tp=2", "ngram")),
]


@pytest.mark.parametrize(("proposer", "filters", "tp"), CASES)
async def test_the_distribution_is_the_models_and_that_of_plain_draws(
    proposer: str, filters: str, tp: int, checkpoints: Checkpoints, plain: dict[str, Tensor]
) -> None:
    async with checkpoints.engine(checkpoints.speculation(proposer), tp=tp) as engine:
        tokens = await draw(engine, filters)
        counted = engine.statistics().speculation
        assert_idle(engine)
    assert counted is not None
    assert 0 < counted.accepted[0] < counted.drafted[0]
    assert distance_p(checkpoints, tokens, filters) > LEAST_P
    without = await plain_draws(checkpoints, plain, filters)
    assert distance_p(checkpoints, without, filters) > LEAST_P
    assert same_source_p(count_pairs(tokens, 1, VOCAB), count_pairs(without, 1, VOCAB)) > LEAST_P


@pytest.mark.parametrize(
    ("worker", "proposer"),
    [
        pytest.param("AcceptsWithP", "draft"),
        *(pytest.param("AcceptsAll", proposer, marks=LONG) for proposer in ("draft", "ngram")),
        *(pytest.param("ResamplesFromTarget", proposer, marks=LONG) for proposer in ("draft", "ngram")),
    ],
)
async def test_a_broken_rule_fails(worker: str, proposer: str, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zspmd.runtime.engine.engine.WORKER", f"support.broken_rejection:{worker}")
    async with checkpoints.engine(checkpoints.speculation(proposer)) as engine:
        tokens = await draw(engine, "warm", num_tokens=3)
    assert distance_p(checkpoints, tokens, "warm") < LEAST_P


@LONG
@pytest.mark.parametrize("proposer", ["draft", "ngram"])
async def test_penalties_keep_their_meaning(proposer: str, checkpoints: Checkpoints) -> None:
    """What a draft says counts for the penalties of those behind it."""
    penalties = {"repetition_penalty": 1.4, "presence_penalty": 0.7, "frequency_penalty": 1.1, "min_p": 0.04}
    drawn = []
    for speculation in (None, checkpoints.speculation(proposer)):
        async with checkpoints.engine(speculation) as engine:
            seed = 0 if speculation is None else 1 << 20
            drawn.append(await draw_tokens(engine, PROMPT, NUM_DRAWS, first_seed=seed, max_tokens=2 + K, **penalties))
    for at in range(1 + K):
        assert same_source_p(count_pairs(drawn[0], at, VOCAB), count_pairs(drawn[1], at, VOCAB)) > LEAST_P


async def test_seeds_repeat_and_greedy_requests_are_plain_ones_with_vocabularies_that_are_padded_otherwise(tmp_path: Path) -> None:
    for name, seed, vocab_size in (("target", 1, 264), ("draft", 2, 260)):
        save_checkpoint(tmp_path / name, seed=seed, vocab_size=vocab_size, **SIZES)
        save_tokenizer(tmp_path / name)
    greedy = zspmd.SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    sampled = zspmd.SamplingParams(max_tokens=24, temperature=0.9, top_k=50, seed=7, n=8, ignore_eos=True, logprobs=1)
    speculation = zspmd.SpeculationConfig(zspmd.DraftConfig(str(tmp_path / "draft"), K), policy="fixed", verify="rejection")
    async with build_engine(tmp_path / "target", num_blocks=128) as engine:
        plain = await complete_all(engine, ["once upon", "a time"], greedy)
        plainly_sampled = await complete_all(engine, ["once upon"], sampled)
    async with build_engine(tmp_path / "target", num_blocks=128, speculation=speculation) as engine:
        mixed = await complete_all(engine, ["once upon", "a time", "there was"], [greedy, greedy, sampled])
        twice = [await complete_all(engine, ["once upon"], sampled) for _ in range(2)]
        assert_idle(engine)
    assert [output.token_ids for output in mixed[:2]] == [output.token_ids for output in plain]
    texts = [[completion.text for completion in outputs[0].outputs] for outputs in (*twice, plainly_sampled)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]  # so it was rejection that drew them
    for completion in twice[0][0].outputs:
        assert [entry.token_id for entry in completion.logprobs or ()] == completion.token_ids
    metrics = twice[0][0].metrics
    assert metrics is not None
    assert 0 < metrics.num_accepted < metrics.num_drafted
