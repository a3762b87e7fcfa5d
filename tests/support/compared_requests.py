"""Requests whose tokens are compared between engines, or with Transformers'."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

from .checkpoints import SIZES

WAYS_TO_SAMPLE: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {"temperature": 1.0},
    "top-k": {"temperature": 1.2, "top_k": 9},
    "top-p": {"temperature": 0.9, "top_p": 0.7},
    "min-p": {"temperature": 1.1, "min_p": 0.05},
    "penalties": {"temperature": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "greedy with penalties": {"temperature": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
    "everything": {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "presence_penalty": -0.3, "logprobs": 2},
}
"""Fields of ``SamplingParams`` that take every way through the sampler."""


def make_prompts(lengths: Iterable[int]) -> list[list[int]]:
    """Return the same prompts of random tokens each time."""
    chance = random.Random(5)
    return [[chance.randrange(SIZES["vocab_size"]) for _ in range(length)] for length in lengths]
