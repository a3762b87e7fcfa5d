"""Whatever is proposed, by whom, how much of it and how often: tokens are those without speculation, and all ranks decide alike.

Here the scheduler and the ranks' workers run in one process; over processes, stages and replicas it is in ``tests/spmd``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import scripted_proposers
from support.checkpoints import save_checkpoint
from support.digested_model import DigestedModel
from support.local_engine import Answer, LocalEngine, Request
from support.speculation_cases import PROPOSERS, WAYS_TO_SAMPLE, answer_plainly, assert_same, make_requests, save_stranger, speculate
from support.threads import ThreadCommunicator, run_ranks

from zspmd.config import EngineConfig, SamplingParams
from zspmd.runtime.engine.draft_checkpoint import DEMO_DRAFT
from zspmd.runtime.engine.tokenizer import Tokenizer

DEMO = DEMO_DRAFT.parent
SCRIPTED = {kind: getattr(scripted_proposers, f"{kind.capitalize()}Model") for kind in scripted_proposers.KINDS}
NAMES = (*PROPOSERS, *SCRIPTED)
POLICIES = ("fixed", "batch", "goodput")
BASE: dict[str, Any] = {"max_num_seqs": 8, "num_blocks": 200, "block_size": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "small pool": {"num_blocks": 26},
    "chunks": {"max_num_batched_tokens": 20, "num_blocks": 40},
    "small pool and chunks, no prefixes": {"num_blocks": 26, "enable_prefix_cache": False, "max_num_batched_tokens": 24},
    "blocks of one": {"block_size": 1, "num_blocks": 75},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
}


@dataclass(frozen=True)
class Case:
    proposer: str
    k: int
    policy: str
    config: str
    window: int
    chance: int

    def __str__(self) -> str:
        return f"{self.proposer}, k {self.k}, {self.policy}, {self.config}, window {self.window}"


def make_cases(*, is_quick: bool) -> list[Any]:
    """Return every proposer with every K, policy and configuration; quick ones are some that have each of these several times."""
    product = itertools.product(NAMES, range(1, 9), POLICIES, CONFIGS)
    cases = [Case(name, k, policy, config, 1 + number % 3, number) for number, (name, k, policy, config) in enumerate(product)]
    chosen = cases[::53] if is_quick else [case for number, case in enumerate(cases) if number % 53]
    return [pytest.param(case, id=str(case), marks=[] if is_quick else pytest.mark.long) for case in chosen]


@dataclass(frozen=True)
class Reference:
    target: Path
    stranger: Path
    requests: list[Request]
    answers: list[Answer]


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    target, stranger = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("stranger")
    save_checkpoint(target)
    save_stranger(stranger)
    requests = make_requests()
    return Reference(target, stranger, requests, answer_plainly(target, requests))


def run_case(
    reference: Reference, case: Case, communicator: Any = None, *, draft_tp: int = 1, dtype: str = "auto"
) -> tuple[LocalEngine, list[Answer]]:
    propose = PROPOSERS.get(case.proposer, PROPOSERS["ngram"])
    proposer = propose(reference.target, reference.stranger, case.k, draft_tp)
    config = EngineConfig(
        **{**BASE, **CONFIGS[case.config], "window": case.window, "dtype": dtype, "speculation": speculate(proposer, case.policy)}
    )
    worker = SCRIPTED.get(case.proposer, DigestedModel)
    engine = LocalEngine(reference.target, config, communicator=communicator, worker=worker, chance=case.chance)
    return engine, engine.run(reference.requests, abort_share=0.03 * (case.chance % 4 == 0))


@pytest.mark.parametrize("case", [*make_cases(is_quick=True), *make_cases(is_quick=False)])
def test_tokens_are_those_without_speculation(reference: Reference, case: Case) -> None:
    engine, answers = run_case(reference, case)
    assert_same(answers, reference.answers)
    check_acceptance(case, engine)


def check_acceptance(case: Case, engine: LocalEngine) -> None:
    """Check that the case proposed what it is for."""
    if case.proposer in ("oracle", "target", "target+target", "target+stranger"):
        assert engine.num_accepted == engine.num_drafted
    if case.proposer == "wrong":
        assert engine.num_accepted == 0
    if case.policy == "fixed" and case.proposer != "ngram":
        assert engine.num_drafted > 0
        assert set(engine.depths) <= set(range(case.k + 1))
    if case.policy == "fixed" and case.proposer == "mixed" and case.k > 2:
        assert 0 < engine.num_accepted < engine.num_drafted


RANKS: dict[str, tuple[str, int, int, int]] = {
    "a draft on each rank": ("target", 3, 1, 2),
    "a draft shared by two ranks": ("target", 4, 2, 2),
    "a draft that is sped up": ("stranger+ngram", 5, 2, 2),
    "now right, now wrong": ("mixed", 6, 1, 2),
    "n-grams": ("ngram", 2, 1, 2),
    "a draft shared by four ranks": ("stranger", 4, 4, 4),
    "drafts within each other over four ranks": ("target+stranger", 4, 4, 4),
}
QUICK_RANKS = {
    ("a draft on each rank", "goodput"),
    ("a draft shared by two ranks", "batch"),
    ("a draft that is sped up", "goodput"),
    ("now right, now wrong", "fixed"),
}


@pytest.mark.parametrize(
    ("ranks", "policy"),
    [
        pytest.param(*pair, id=", ".join(pair), marks=[] if pair in QUICK_RANKS else pytest.mark.long)
        for pair in itertools.product(RANKS, POLICIES)
    ],
)
def test_all_ranks_decide_alike(reference: Reference, ranks: str, policy: str) -> None:
    proposer, k, draft_tp, tp = RANKS[ranks]
    case = Case(proposer, k, policy, "small pool", 2, chance=k)

    def run(communicator: ThreadCommunicator) -> tuple[list[Answer], list[bytes]]:
        engine, answers = run_case(reference, case, communicator, draft_tp=draft_tp)
        assert isinstance(engine.worker, DigestedModel)
        return answers, engine.worker.take_digests()

    results = run_ranks(tp, run)
    for answers, digests in results:
        assert_same(answers, reference.answers)
        assert digests == results[0][1]
        assert len(set(digests)) == len(digests) > 20, "each step decides something else"


DEMO_PROMPTS = ("123+456=", "zspmd is", "999+1=", "A step", "1+2=3\n45+6=", "The driver", "7+7=", "Nothing that it knows")


@pytest.fixture(scope="module")
def demo() -> Reference:
    tokenizer = Tokenizer.from_directory(DEMO)
    ways = itertools.cycle(WAYS_TO_SAMPLE[way] for way in ("greedy", "plain", "top-p", "everything"))
    requests = [
        Request(tokenizer.encode(text), SamplingParams(**{"max_tokens": 30, "seed": seed, **way}), seed)
        for seed, (text, way) in enumerate(zip(DEMO_PROMPTS * 2, ways, strict=False))
    ]
    return Reference(DEMO, DEMO_DRAFT, requests, answer_plainly(DEMO, requests, writes_oracle=False))


@pytest.mark.parametrize(
    ("proposer", "k", "policy"),
    [
        pytest.param("stranger", 4, "fixed", id="its draft"),
        pytest.param("stranger+ngram", 6, "goodput", id="its draft, sped up"),
        pytest.param("ngram", 3, "batch", id="n-grams"),
        *(
            pytest.param(*case, id="{}, k {}, {}".format(*case), marks=pytest.mark.long)
            for case in itertools.product(("stranger", "stranger+ngram", "ngram", "target+stranger"), range(1, 9), POLICIES)
        ),
    ],
)
def test_the_demo_model_says_what_it_says_without_speculation(demo: Reference, proposer: str, k: int, policy: str) -> None:
    engine, answers = run_case(demo, Case(proposer, k, policy, "small pool", 2, chance=k + 1), dtype="float32")
    assert_same(answers, demo.answers)
    if proposer == "stranger" and policy == "fixed" and k == 4:
        assert engine.num_accepted > engine.num_drafted / 2


@pytest.mark.filterwarnings("ignore:.* runs through Transformers' modelling code:UserWarning")
@pytest.mark.parametrize("proposer", ["mixed", "stranger+ngram"])
@pytest.mark.parametrize(
    "family",
    ["deepseek-v3", *(pytest.param(family, marks=pytest.mark.long) for family in ("mistral", "dots1", "qwen3", "granite"))],
)
def test_models_with_other_attention_or_experts_verify_drafts(tmp_path: Path, reference: Reference, family: str, proposer: str) -> None:
    """A sliding window, latents, a mixture, norms of heads, and a model that Transformers computes."""
    save_checkpoint(tmp_path, family)
    other = Reference(tmp_path, reference.stranger, reference.requests, answer_plainly(tmp_path, reference.requests))
    case = Case(proposer, 5, "fixed", "small pool and chunks, no prefixes", 2, chance=2)
    engine, answers = run_case(other, case)
    assert_same(answers, other.answers)
    assert engine.num_drafted > 0
