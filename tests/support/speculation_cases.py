"""Requests and proposers that tests of speculation share, and the proof that they all ask for: tokens as without it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from zspmd.config import EngineConfig, SamplingParams
from zspmd.speculation_config import DraftConfig, NgramConfig, SpeculationConfig

from . import compared_requests
from .checkpoints import SIZES, save_checkpoint
from .local_engine import Answer, LocalEngine, Request
from .scripted_proposers import write_oracle

VOCAB_SIZE = SIZES["vocab_size"]
MAX_TOKENS = 26
LOGPROB_ATOL = 1e-4
WAYS_TO_SAMPLE: dict[str, dict[str, Any]] = {
    **compared_requests.WAYS_TO_SAMPLE,
    "greedy with logprobs": {"temperature": 0, "logprobs": 1},
    "min tokens": {"temperature": 3.0, "min_tokens": 6, "ignore_eos": False, "stop_token_ids": list(range(0, VOCAB_SIZE, 3))},
    "stop tokens": {"temperature": 1.0, "ignore_eos": False, "stop_token_ids": list(range(0, VOCAB_SIZE, 17))},
}

DraftOf = Callable[[Path, Path, int, int], NgramConfig | DraftConfig]
"""(target, another checkpoint, k, draft tp) -> proposer."""

PROPOSERS: dict[str, DraftOf] = {
    "ngram": lambda target, other, k, tp: NgramConfig(k, min_n=1),
    "target": lambda target, other, k, tp: DraftConfig(str(target), k, tp),
    "stranger": lambda target, other, k, tp: DraftConfig(str(other), k, tp),
    "stranger+ngram": lambda target, other, k, tp: DraftConfig(str(other), k, tp, NgramConfig(2, min_n=1)),
    "target+stranger": lambda target, other, k, tp: DraftConfig(str(target), k, tp, DraftConfig(str(other), max(1, k - 1))),
    "target+target": lambda target, other, k, tp: DraftConfig(str(target), k, tp, DraftConfig(str(target), 2)),
}
"""Draft models that are always right, nearly never, and within each other. Scripted ones are asked for as "ngram" is."""


def speculate(proposer: NgramConfig | DraftConfig, policy: str) -> SpeculationConfig:
    """Return a configuration; "batch" has depth 0 between others, so that drafts come, go and come back as the batch changes."""
    k = proposer.k
    depths = ((1, k), (2, max(1, k // 2)), (4, 0), (6, 1), (7, k)) if policy == "batch" else ()
    return SpeculationConfig(proposer, policy, depths)


def save_stranger(directory: Path) -> None:
    """Write a smaller checkpoint of the same vocabulary, half the layers and a context that requests outgrow."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 30,
    }
    save_checkpoint(directory, seed=5, **sizes)


def make_requests(count: int = 22) -> list[Request]:
    """Return requests of every way to sample; of every second prompt the beginning is the same, and some repeat themselves."""
    chance = random.Random(3)
    shared = [chance.randrange(VOCAB_SIZE) for _ in range(9)]
    requests = []
    for number, way in zip(range(count), itertools.cycle(WAYS_TO_SAMPLE.values())):
        own = [chance.randrange(VOCAB_SIZE) for _ in range(chance.randint(1, 14))]
        prompt = shared * (number % 2) + own * (1 + (number % 3 == 0))
        most = chance.randint(way.get("min_tokens", 1), MAX_TOKENS)
        requests.append(Request(prompt, SamplingParams(**{"max_tokens": most, "ignore_eos": True, "seed": number, **way}), number))
    return requests


def answer_plainly(directory: Path, requests: Sequence[Request], *, writes_oracle: bool = True) -> list[Answer]:
    """Return what each request gives alone, without speculation and with nothing clever switched on, in float32."""
    config: dict[str, Any] = {
        "max_num_seqs": 1,
        "num_blocks": 80,
        "block_size": 4,
        "window": 1,
        "enable_prefix_cache": False,
        "dtype": "float32",
    }
    plain = LocalEngine(directory, EngineConfig(**config))
    answers = [plain.run([request])[0] for request in requests]
    if writes_oracle:
        write_oracle(directory, {r.seed: [*r.prompt, *answer.token_ids] for r, answer in zip(requests, answers, strict=True)})
    return answers


def assert_same(answers: Sequence[Answer], plain: Sequence[Answer]) -> None:
    """Check that tokens, ends and log-probabilities are those without speculation; of an aborted request as far as it came."""
    for number, (answer, wanted) in enumerate(zip(answers, plain, strict=True)):
        size = len(answer.token_ids)
        if answer.finish_reason != "abort":
            assert answer.finish_reason == wanted.finish_reason, f"request {number}"
            assert size == len(wanted.token_ids), f"request {number}"
        assert answer.token_ids == wanted.token_ids[:size], f"request {number}"
        assert len(answer.logprobs) == (size if wanted.logprobs else 0), f"request {number}"
        worst = max((abs(a - b) for a, b in zip(answer.logprobs, wanted.logprobs)), default=0.0)
        assert worst < LOGPROB_ATOL, f"request {number}"
