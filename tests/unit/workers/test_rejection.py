"""Rejection sampling keeps the target's distribution, the test of it sees broken rules, and the edges of the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.chi_square import chi_square_p
from support.speculated_chains import Speculation, count_pairs, make_chain, pair_probabilities, total_variation
from torch import Tensor

from zspmd.errors import InternalError
from zspmd.workers.gumbel import Stream, gumbel_noise, row_keys, uniforms
from zspmd.workers.speculation import rejection
from zspmd.workers.speculation.rejection import probabilities, verify_by_rejection

VOCAB = 6
NUM_DRAWS = 20_000
LEAST_P = 0.001
FILTERS: dict[str, dict[str, Any]] = {"none": {}, "top-k": {"top_k": 4}, "top-p": {"top_p": 0.85}, "both": {"top_k": 5, "top_p": 0.9}}


def make_logits(seed: int, scale: float = 1.2) -> Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def make_chains(distance: float, **params: Any) -> tuple[Tensor, Tensor]:
    """Return a target and a draft, the farther from each other the larger ``distance``."""
    return make_chain(make_logits(1), **params), make_chain(make_logits(1) + distance * make_logits(2), **params)


def worst_p(speculation: Speculation) -> float:
    """Return the least p of two pairs of tokens: the first two, and the last that a first round with k drafts may decide."""
    last = max(speculation.k - 1, 0)
    tokens = speculation.generate(NUM_DRAWS, last + 2)
    return min(chi_square_p(count_pairs(tokens, at, VOCAB), pair_probabilities(speculation.target, at)) for at in {0, last})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
def test_distribution_is_that_of_the_target(k: int, filters: str, temperature: float) -> None:
    target, draft = make_chains(0.7, temperature=temperature, **FILTERS[filters])
    assert worst_p(Speculation(target, draft, k)) > LEAST_P


@pytest.mark.parametrize(("distance", "variation"), [(0.15, 0.1), (0.5, 0.3), (1.0, 0.5), (2.0, 0.7), (6.0, 0.9)])
def test_distribution_is_kept_whatever_the_draft_model(distance: float, variation: float) -> None:
    target = make_chain(make_logits(1))
    draft = make_chain(make_logits(1) - distance * make_logits(1).abs() + distance * make_logits(2))
    assert float(total_variation(target, draft).mean()) == pytest.approx(variation, abs=0.1)
    assert worst_p(Speculation(target, draft, 2)) > LEAST_P


@pytest.mark.parametrize("k", [1, 4])
def test_a_proposer_without_chance_keeps_the_distribution(k: int) -> None:
    assert worst_p(Speculation(make_chain(make_logits(1)), None, k)) > LEAST_P


def test_sequences_with_different_numbers_of_drafts_keep_the_distribution() -> None:
    assert worst_p(Speculation(*make_chains(0.7), 4, is_ragged=True)) > LEAST_P


Residual = Callable[[Tensor, Tensor], Tensor]
BROKEN: dict[str, tuple[str, Callable[..., Any]]] = {
    "residual-is-p": ("_residual", lambda p, q: p),
    "residual-is-distance": ("_residual", lambda p, q: (p - q).abs()),
    "accept-with-p": ("_accepts", lambda p, q, u: u < p),
    "accept-all": ("_accepts", lambda p, q, u: u < 1),
    "accept-ratio-inverted": ("_accepts", lambda p, q, u: u * p < q),
}


@pytest.mark.parametrize("filters", ["none", "both"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_fails(name: str, filters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, broken = BROKEN[name]
    monkeypatch.setattr(rejection, function, broken)
    assert worst_p(Speculation(*make_chains(0.7, **FILTERS[filters]), 2)) < LEAST_P


def test_a_wrongly_declared_draft_distribution_fails() -> None:
    target, draft = make_chains(0.7)
    assert worst_p(Speculation(target, draft, 2, declared=make_chains(0.9)[1])) < LEAST_P
    assert worst_p(Speculation(target, draft, 2, declared=make_chains(0.7, temperature=1.2)[1])) < LEAST_P


def test_drafts_drawn_with_the_noise_of_rejections_fail() -> None:
    assert worst_p(Speculation(*make_chains(0.7), 2, draft_stream=Stream.RESIDUAL)) < LEAST_P


@pytest.mark.parametrize("filters", FILTERS)
def test_share_of_accepted_drafts_is_the_common_mass(filters: str) -> None:
    target, draft = make_chains(0.7, **FILTERS[filters])
    speculation = Speculation(target, draft, 1)
    speculation.generate(NUM_DRAWS, 1)
    share = float(torch.minimum(target[0], draft[0]).sum())
    deviation = math.sqrt(share * (1 - share) / NUM_DRAWS)
    assert abs(speculation.num_accepted.mean() - share) < 3.3 * deviation


def draw_batch(num_drafts: list[int], vocab_size: int = 40) -> dict[str, Any]:
    """Return arguments of ``verify_by_rejection``, with drafts that were drawn from what is declared."""
    counts, total = np.array(num_drafts), sum(num_drafts)
    generator = torch.Generator().manual_seed(3)
    target = probabilities(torch.randn(total + len(counts), vocab_size, generator=generator))
    is_draft_row = torch.ones(len(target), dtype=torch.bool)
    is_draft_row[np.cumsum(counts + 1) - 1] = False
    draft = probabilities(target[is_draft_row].log() + 0.4 * torch.randn(total, vocab_size, generator=generator))
    drafts = draft.multinomial(1, generator=generator)[:, 0].numpy() if total else np.empty(0)
    return {
        "target_probs": target,
        "draft_probs": draft,
        "drafts": drafts.astype(np.int32),
        "num_drafts": counts,
        "seeds": np.arange(len(counts), dtype=np.uint64) + 11,
        "places": np.arange(len(counts)) * 3 + 1,
    }


def verify_plainly(p: Tensor, q: Tensor, drafts: list[int], seed: int, place: int) -> tuple[int, int]:
    """The rule for one sequence, step by step."""

    def draw(weights: Tensor, at: int, stream: Stream) -> int:
        keys = torch.from_numpy(row_keys(np.array([seed], np.uint64), np.array([at]), stream))
        return int((weights.log() + gumbel_noise(keys, torch.arange(len(weights), dtype=torch.int32))).argmax())

    for i, token in enumerate(drafts):
        u = float(uniforms(np.array([seed], np.uint64), np.array([place + i]), Stream.ACCEPT)[0])
        if u >= float(p[i, token] / q[i, token]):
            return i, draw((p[i] - q[i]).clamp(min=0), place + i, Stream.RESIDUAL)
    return len(drafts), draw(p[len(drafts)], place + len(drafts), Stream.SAMPLE)


def test_every_decision_and_token_is_that_of_the_rule_and_of_its_place() -> None:
    batch = draw_batch([2, 0, 4, 1, 0, 3] * 20)
    counts, drafts = batch["num_drafts"], batch["drafts"].tolist()
    first = np.cumsum(counts) - counts
    expected = []
    for s, (at, count) in enumerate(zip(first.tolist(), counts.tolist())):
        own = slice(at, at + count)
        rows = batch["target_probs"][at + s : at + s + count + 1]
        expected.append(verify_plainly(rows, batch["draft_probs"][own], drafts[own], int(batch["seeds"][s]), int(batch["places"][s])))
    accepted, following = verify_by_rejection(**batch)
    assert list(zip(accepted.tolist(), following.tolist())) == expected


@pytest.mark.parametrize("is_certain", [False, True])
def test_a_sequence_does_not_depend_on_its_batch_mates(is_certain: bool) -> None:
    batch = draw_batch([2, 0, 4, 1, 0, 3] * 10)
    if is_certain:
        batch["draft_probs"] = None
    accepted, following = verify_by_rejection(**batch)
    counts = batch["num_drafts"]
    assert 0 < accepted.sum() < counts.sum()
    first = np.cumsum(counts) - counts
    for s, count in enumerate(counts):
        drafts = slice(first[s], first[s] + count)
        alone = verify_by_rejection(
            batch["target_probs"][first[s] + s : first[s] + s + count + 1],
            None if is_certain else batch["draft_probs"][drafts],
            batch["drafts"][drafts],
            counts[s : s + 1],
            batch["seeds"][s : s + 1],
            batch["places"][s : s + 1],
        )
        assert (alone[0].tolist(), alone[1].tolist()) == ([accepted[s]], [following[s]])
    assert accepted.dtype == np.int64
    assert following.dtype == np.int32


def test_inputs_are_not_written_to() -> None:
    batch = draw_batch([2, 0, 3] * 5)
    before = {name: value.clone() if isinstance(value, Tensor) else value.copy() for name, value in batch.items()}
    verify_by_rejection(**batch)
    assert all((before[name] == batch[name]).all() for name in batch)


def test_without_drafts_it_is_plain_sampling() -> None:
    scores = torch.randn(200, 40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    seeds, places, counts = np.arange(200, dtype=np.uint64), np.arange(200) % 7, np.zeros(200, np.int64)
    _, tokens = verify_by_rejection(probabilities(scores), None, np.empty(0, np.int32), counts, seeds, places)
    noise = gumbel_noise(torch.from_numpy(row_keys(seeds, places))[:, None], torch.arange(40, dtype=torch.int32))
    assert tokens.tolist() == (scores + noise).argmax(-1).tolist()


def test_certainty_is_a_distribution_of_one_token() -> None:
    batch = draw_batch([3, 1, 2] * 200)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(batch["drafts"]).long(), 40).double()
    stated = verify_by_rejection(**{**batch, "draft_probs": one_hot})
    certain = verify_by_rejection(**{**batch, "draft_probs": None})
    assert (stated[0].tolist(), stated[1].tolist()) == (certain[0].tolist(), certain[1].tolist())


def test_a_draft_equal_to_the_target_is_always_accepted() -> None:
    chain = make_chain(make_logits(1))
    speculation = Speculation(chain, chain, 4)
    speculation.generate(NUM_DRAWS, 1)
    assert (speculation.num_accepted == 4).all()


def test_a_rejection_with_nothing_left_samples_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rejection, "_accepts", lambda p, q, u: u < 0
    )  # as if rounding had refused a draft that is as likely as it should be
    chain = make_chain(make_logits(1))
    assert worst_p(Speculation(chain, chain, 1)) > LEAST_P


def test_rounding_errors_in_the_residual_stay_within_the_target() -> None:
    target = make_chain(make_logits(1), top_k=3)
    draft = target * (1 + 2**-52 * torch.tensor([1, -1, 1, 1, -1, 1], dtype=torch.float64))
    left = rejection._residual(target, draft)
    assert left.sum(-1).min() > 0
    assert not left[target == 0].any()


@pytest.mark.parametrize("declared", [0.0, 1e-300, 1.0])
def test_an_impossible_token_is_never_accepted(declared: float) -> None:
    target = torch.tensor([[0.0, 0.25, 0.75]], dtype=torch.float64).repeat(2000, 1)
    draft = torch.tensor([[declared, 1 - declared, 0.0]], dtype=torch.float64).repeat(1000, 1)
    seeds, ones = np.arange(1000, dtype=np.uint64), np.ones(1000, np.int64)
    accepted, following = verify_by_rejection(target, draft, np.zeros(1000, np.int32), ones, seeds, ones)
    assert not accepted.any()
    assert set(following.tolist()) <= {1, 2}


def test_probabilities_are_those_of_the_noisy_scores() -> None:
    scores = torch.tensor([[1.0, -math.inf, 0.0], [800.0, 801.0, -800.0]], dtype=torch.float64)
    table = probabilities(scores)
    assert table.dtype == torch.float64
    assert table.sum(-1).tolist() == pytest.approx([1, 1])
    assert table[0].tolist() == pytest.approx([math.e / (1 + math.e), 0, 1 / (1 + math.e)])
    assert table[1, 1] == pytest.approx(math.e / (1 + math.e))


@pytest.mark.parametrize("where", ["target_probs", "draft_probs"])
def test_probabilities_that_are_no_numbers_are_an_error(where: str) -> None:
    batch = draw_batch([2, 1, 2])
    batch[where][2 + (where == "target_probs")] = math.nan  # the second sequence's first row
    with pytest.raises(InternalError, match=r"sequence 1 of the 3 that are verified .*check both checkpoints for NaN"):
        verify_by_rejection(**batch)
