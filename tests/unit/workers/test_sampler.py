"""Sampling against a plain reference on whole rows, over one to three shards of the vocabulary."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.threads import ThreadCommunicator, run_ranks
from torch import Tensor

from zspmd.errors import InternalError
from zspmd.transport.batch import BatchStep, SlotAdd
from zspmd.workers.batch_state import BatchState
from zspmd.workers.filters import build_keep_mask
from zspmd.workers.gumbel import gumbel_noise, row_keys
from zspmd.workers.penalties import apply_penalties
from zspmd.workers.sampler import SampledTokens, Sampler

VOCAB = 61
NO_SLOTS = np.empty(0, np.uint16)


def make_add(slot: int, tokens: list[int] | None = None, *, num_prompt: int | None = None, **params: Any) -> SlotAdd:
    tokens = tokens or [1, 2, 3]
    ends = np.array(params.pop("end_token_ids", []), np.int32)
    prompt = len(tokens) if num_prompt is None else num_prompt
    return SlotAdd(slot, np.array(tokens, np.int32), prompt, 0, np.empty(0, np.uint32), end_token_ids=ends, **params)


def make_state(adds: list[SlotAdd]) -> BatchState:
    state = BatchState(len(adds), 64, 16, 2)
    state.apply(BatchStep(adds=adds, decode_slots=NO_SLOTS))
    return state


def make_logits(num_rows: int, vocab_size: int = VOCAB, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


class CountingCommunicator(ThreadCommunicator):
    """Records the shapes that were gathered."""

    def __init__(self, inner: ThreadCommunicator) -> None:
        super().__init__(inner.rank, inner._slots, inner._barrier)
        self.shapes: list[tuple[int, ...]] = []

    def all_gather(self, tensor: Tensor) -> Tensor:
        self.shapes.append(tuple(tensor.shape))
        return super().all_gather(tensor)


def sample(
    logits: Tensor, state: BatchState, slots: list[int] | None = None, *, size: int = 1
) -> tuple[SampledTokens, list[tuple[int, ...]]]:
    """Sample over ``size`` ranks, check that all agree, and return the tokens and the gathered shapes."""
    rows = np.arange(len(logits)) if slots is None else np.array(slots)
    vocab_size = logits.shape[1]
    width = -(-vocab_size // size)
    padded = torch.nn.functional.pad(logits, (0, size * width - vocab_size), value=-torch.inf)

    def run(communicator: ThreadCommunicator) -> tuple[SampledTokens, list[tuple[int, ...]]]:
        start = communicator.rank * width
        counting = CountingCommunicator(communicator)
        shard = padded[:, start : start + width].contiguous()
        before = shard.clone()
        sampled = Sampler(counting, vocab_size, start, start + width).sample(shard, state, rows, state.num_tokens[rows])
        assert torch.equal(shard, before)
        return sampled, counting.shapes

    results = run_ranks(size, run)
    first, shapes = results[0]
    for other, other_shapes in results[1:]:
        assert other.token_ids.tolist() == first.token_ids.tolist()
        assert other.logprobs == first.logprobs
        assert other_shapes == shapes
    assert first.token_ids.dtype == np.int32
    return first, shapes


def reference_token(logits: Tensor, add: SlotAdd) -> int:
    """The rules in plain Python, on one whole row."""
    scores = {token: float(value) for token, value in enumerate(logits)}
    history, output = add.tokens.tolist(), add.tokens.tolist()[add.num_prompt :]
    for token in set(history):
        scores[token] = scores[token] / add.repetition_penalty if scores[token] > 0 else scores[token] * add.repetition_penalty
        scores[token] -= add.frequency_penalty * output.count(token) + add.presence_penalty * (token in output)
    if len(output) < add.min_tokens:
        for token in add.end_token_ids.tolist():
            scores.pop(token, None)
    if add.temperature == 0:
        return max(scores, key=lambda token: (scores[token], -token))
    scores = {token: value / add.temperature for token, value in scores.items()}
    if add.top_k:
        scores = dict(sorted(scores.items(), key=lambda item: -item[1])[: add.top_k])
    scores = reference_top_p(scores, add.top_p)
    largest = max(scores.values())
    scores = {token: value for token, value in scores.items() if math.exp(value - largest) >= add.min_p}
    keys = row_keys(np.array([add.seed], np.uint64), np.array([len(history)], np.int64))
    noise = gumbel_noise(torch.from_numpy(keys)[0], torch.arange(len(logits), dtype=torch.int32)).tolist()
    return max(scores, key=lambda token: scores[token] + noise[token])


def reference_top_p(scores: dict[int, float], top_p: float) -> dict[int, float]:
    if top_p == 1:
        return scores
    weights = {token: math.exp(value) for token, value in sorted(scores.items(), key=lambda item: -item[1])}
    total, mass, kept = sum(weights.values()), 0.0, {}
    for token, weight in weights.items():
        if mass >= top_p * total:
            break
        kept[token] = scores[token]
        mass += weight
    return kept


def random_add(slot: int, rng: random.Random) -> SlotAdd:
    tokens = [rng.randrange(VOCAB) for _ in range(rng.randint(2, 20))]
    return make_add(
        slot,
        tokens,
        num_prompt=rng.randint(1, len(tokens)),
        seed=rng.randrange(1 << 63),
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 5, 60, 61, 1000]),
        top_p=rng.choice([1.0, 1.0, 0.05, 0.6, 0.95]),
        min_p=rng.choice([0.0, 0.0, 0.1, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=rng.choice([0.0, 0.0, 0.7]),
        frequency_penalty=rng.choice([0.0, 0.0, -0.5]),
        logprobs=rng.choice([-1, -1, 0, 4]),
        min_tokens=rng.choice([0, 0, 30]),
        end_token_ids=[rng.randrange(VOCAB) for _ in range(3)],
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tokens_equal_the_reference_on_whole_rows(size: int) -> None:
    rng = random.Random(1)
    adds = [random_add(slot, rng) for slot in range(200)]
    logits = make_logits(len(adds))
    sampled, _ = sample(logits, make_state(adds), size=size)
    assert sampled.token_ids.tolist() == [reference_token(row, add) for row, add in zip(logits, adds)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("ties", [[0, 60], [20, 21], [29, 31, 45], [60]], ids=str)
def test_greedy_tie_goes_to_the_smallest_id(size: int, ties: list[int]) -> None:
    logits = make_logits(1)
    logits[0, ties] = 50.0
    sampled, _ = sample(logits, make_state([make_add(0, temperature=0.0)]), size=size)
    assert sampled.token_ids.tolist() == [ties[0]]


def test_greedy_ignores_filters_and_gathers_one_pair_a_row() -> None:
    adds = [make_add(slot, temperature=0.0, top_k=3, top_p=0.5, min_p=0.2) for slot in range(4)]
    logits = make_logits(4)
    sampled, shapes = sample(logits, make_state(adds), size=2)
    assert sampled.token_ids.tolist() == logits.argmax(-1).tolist()
    assert sampled.logprobs is None
    assert shapes == [(4, 2)]


def test_only_rows_that_need_it_are_gathered_whole() -> None:
    adds = [make_add(0, temperature=1.0), make_add(1, temperature=1.0, top_p=0.9), make_add(2), make_add(3, logprobs=2)]
    _, shapes = sample(make_logits(4), make_state(adds), size=2)
    assert shapes == [(2, 2), (2, 31)]


FILTERS: dict[str, tuple[dict[str, Any], Any]] = {
    "top-k": ({"top_k": 7}, lambda: transformers.TopKLogitsWarper(7)),
    "top-k-1": ({"top_k": 1}, lambda: transformers.TopKLogitsWarper(1)),
    "top-k-above-vocabulary": ({"top_k": 5000}, lambda: transformers.TopKLogitsWarper(5000)),
    "top-p": ({"top_p": 0.8}, lambda: transformers.TopPLogitsWarper(0.8)),
    "top-p-nearly-all": ({"top_p": 0.999}, lambda: transformers.TopPLogitsWarper(0.999)),
    "top-p-tiny": ({"top_p": 1e-6}, lambda: transformers.TopPLogitsWarper(1e-6)),
    "min-p": ({"min_p": 0.05}, lambda: transformers.MinPLogitsWarper(0.05)),
    "min-p-1": ({"min_p": 1.0}, lambda: transformers.MinPLogitsWarper(1.0)),
}


@pytest.mark.parametrize("vocab_size", [VOCAB, 3000])
@pytest.mark.parametrize("name", FILTERS)
def test_filter_keeps_what_transformers_keeps(name: str, vocab_size: int) -> None:
    params, make_warper = FILTERS[name]
    logits = make_logits(8, vocab_size, scale=1.5).double()
    state = make_state([make_add(slot, **params) for slot in range(8)])
    expected = make_warper()(torch.zeros(8, 1, dtype=torch.long), logits.clone()) > -torch.inf
    assert torch.equal(build_keep_mask(logits, state.sampling), expected)


def test_filters_of_one_row_do_not_touch_another() -> None:
    params = [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.3}, {"top_k": 40, "top_p": 0.7, "min_p": 0.01}]
    state = make_state([make_add(slot, **row) for slot, row in enumerate(params)])  # type: ignore[arg-type]  # fields by name
    logits = make_logits(5, 3000, scale=1.0).double()
    together = build_keep_mask(logits, state.sampling)
    alone = [build_keep_mask(logits[i : i + 1], state.sampling[i : i + 1]) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))
    assert together[0].all()
    assert together[1].sum() == 3


@pytest.mark.parametrize("params", [{"top_k": 2}, {"top_p": 0.3}, {"top_k": 3, "top_p": 0.5}], ids=str)
def test_equal_logits_are_kept_together(params: dict[str, Any]) -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 5.0, 5.0, 1.0]], dtype=torch.float64)
    state = make_state([make_add(0, **params)])
    assert build_keep_mask(logits, state.sampling).tolist() == [[False, True, True, True, True, False]]


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.8])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    histories = [[4, 4, 9, 60], [0, 1, 2, 3], [7, 7, 7, 7]]
    state = make_state([make_add(slot, tokens, num_prompt=2, repetition_penalty=penalty) for slot, tokens in enumerate(histories)])
    logits = make_logits(3)
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(histories), logits.clone())
    assert torch.equal(apply_penalties(logits, state, np.arange(3), state.num_tokens[:3], 0), expected)


def test_presence_and_frequency_count_the_output_only() -> None:
    state = make_state([make_add(0, [5, 6, 6, 7, 7, 7], num_prompt=2, presence_penalty=0.5, frequency_penalty=0.25)])
    logits = torch.zeros(1, VOCAB)
    penalised = apply_penalties(logits, state, np.array([0]), state.num_tokens[:1], 0)
    changed = {token: value for token, value in enumerate(penalised[0].tolist()) if value}
    assert changed == {6: -0.75, 7: -1.25}


def test_penalties_leave_the_logits_alone_when_no_row_asks() -> None:
    logits = make_logits(2)
    state = make_state([make_add(0), make_add(1, min_tokens=0, end_token_ids=[5])])
    assert apply_penalties(logits, state, np.arange(2), state.num_tokens[:2], 0) is logits


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("num_generated", "is_masked"), [(0, True), (2, True), (3, False)])
@pytest.mark.parametrize("logprobs", [-1, 1], ids=["by-shard", "whole"])
def test_end_tokens_are_not_sampled_before_min_tokens(num_generated: int, is_masked: bool, logprobs: int, size: int) -> None:
    tokens = list(range(10, 15 + num_generated))
    state = make_state([make_add(0, tokens, num_prompt=5, min_tokens=3, end_token_ids=[3, 50], logprobs=logprobs)])
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 50, 30]] = torch.tensor([9.0, 8.0, 7.0])
    sampled, _ = sample(logits, state, size=size)
    assert sampled.token_ids.tolist() == [30 if is_masked else 3]


@pytest.mark.parametrize("size", [1, 3])
def test_logprobs_are_those_of_the_model_whatever_the_processing(size: int) -> None:
    wanted = [0, 3, 20, -1]
    processing: dict[str, Any] = {"temperature": 0.5, "top_k": 5, "repetition_penalty": 2.0, "presence_penalty": 1.0}
    state = make_state([make_add(slot, [1, 2, 3], num_prompt=1, logprobs=count, **processing) for slot, count in enumerate(wanted)])
    logits = make_logits(4)
    sampled, _ = sample(logits, state, size=size)
    table = torch.log_softmax(logits, -1)
    assert sampled.logprobs is not None
    assert sampled.logprobs[3] is None
    for row, count in enumerate(wanted[:3]):
        chosen, top = sampled.logprobs[row] or []
        assert chosen == pytest.approx(float(table[row, sampled.token_ids[row]]), abs=1e-6)
        values, ids = table[row].topk(count)
        assert [token for token, _ in top] == ids.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-6)


def test_more_logprobs_than_tokens_gives_them_all() -> None:
    sampled, _ = sample(make_logits(1, 5), make_state([make_add(0, logprobs=20)]))
    assert sampled.logprobs is not None
    assert len(sampled.logprobs[0][1]) == 5  # type: ignore[index]  # not None, as asked


def mixed_adds(count: int) -> list[SlotAdd]:
    rng = random.Random(5)
    return [random_add(slot, rng) for slot in range(count)]


def test_tokens_do_not_depend_on_order_or_batch_mates() -> None:
    adds = mixed_adds(40)
    logits, state = make_logits(40), make_state(adds)
    together = sample(logits, state)[0].token_ids.tolist()
    order = random.Random(2).sample(range(40), 40)
    assert sample(logits[order], state, order)[0].token_ids.tolist() == [together[i] for i in order]
    assert [sample(logits[i : i + 1], state, [i])[0].token_ids[0] for i in range(40)] == together


def test_asking_for_logprobs_changes_no_token() -> None:
    adds = mixed_adds(60)
    logits = make_logits(60)
    without = sample(logits, make_state([replace(add, logprobs=-1) for add in adds]))[0]
    asked = sample(logits, make_state([replace(add, logprobs=2) for add in adds]))[0]
    assert without.token_ids.tolist() == asked.token_ids.tolist()


def test_seed_and_position_alone_decide_between_equal_rows() -> None:
    logits = torch.zeros(1, VOCAB).repeat(64, 1)
    same = make_state([make_add(slot, seed=3, temperature=1.0) for slot in range(64)])
    assert len(set(sample(logits, same)[0].token_ids.tolist())) == 1
    by_seed = make_state([make_add(slot, seed=slot, temperature=1.0) for slot in range(64)])
    assert len(set(sample(logits, by_seed)[0].token_ids.tolist())) > 20
    by_position = make_state([make_add(slot, [1] * (slot % 60 + 1), seed=3, temperature=1.0) for slot in range(64)])
    assert len(set(sample(logits, by_position)[0].token_ids.tolist())) > 20


NUM_DRAWS = 4096
DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "temperature": {"temperature": 0.7},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
}


def draw_counts(params: dict[str, Any], row: Tensor) -> Tensor:
    state = make_state([make_add(slot, seed=slot, **params) for slot in range(NUM_DRAWS)])
    sampled, _ = sample(row.repeat(NUM_DRAWS, 1), state, size=2)
    return torch.bincount(torch.from_numpy(sampled.token_ids).long(), minlength=row.shape[1]).double()


def chi_square_excess(counts: Tensor, probabilities: Tensor) -> float:
    """Return by how many standard deviations chi-square exceeds its mean."""
    possible = probabilities > 0
    if counts[~possible].any():
        return math.inf
    expected = probabilities[possible] * NUM_DRAWS
    freedom = int(possible.sum()) - 1
    return (float(((counts[possible] - expected) ** 2 / expected).sum()) - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_tokens_are_drawn_from_the_processed_softmax(name: str) -> None:
    params = DISTRIBUTIONS[name]
    row = make_logits(1, 13, scale=1.0)
    scaled = row.double() / params["temperature"]
    keep = build_keep_mask(scaled, make_state([make_add(0, **params)]).sampling)
    counts = draw_counts(params, row)
    assert chi_square_excess(counts, scaled.masked_fill(~keep, -torch.inf).softmax(-1)[0]) < 5
    wrong = (row.double() / (params["temperature"] * 1.25)).masked_fill(~keep, -torch.inf).softmax(-1)[0]
    assert chi_square_excess(counts, wrong) > 5  # the test sees a temperature that is a quarter off


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2}], ids=["greedy", "plain", "top-k"])
def test_logits_that_are_no_numbers_are_an_error(params: dict[str, Any], value: float) -> None:
    logits = make_logits(2)
    logits[1, 40] = value
    with pytest.raises(InternalError, match=r"the best logit of slot 1 is .*check the checkpoint for NaN"):
        sample(logits, make_state([make_add(0, **params), make_add(1, **params)]), size=2)
