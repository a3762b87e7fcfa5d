"""Prompts whose continuations are easy or hard to guess: text that the demo model knows, and random tokens for any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....config import SamplingParams
from ...engine.prompts import Prompt

# Beginnings of the lines that the demo model knows by heart; it ends each of them itself.
_LINES = ("zspmd is", "A worker", "The driver", "Every rank", "A step")
# A text, and its beginning again, which is to be gone on with: what an editor asks for, and what n-grams find in the prompt.
_EDITS = (
    "The driver decides each step, publishes it to all ranks, and collects what they send back. The driver decides each step, publishes",
    "A step is one forward pass by all ranks. Steps count up by one, and no number is used twice in a A step is one",
    "zspmd is an asyncio message-passing runtime over ZeroMQ. A driver publishes each step once, zspmd is an asyncio message-passing",
    "A worker is one process that holds one rank. It A worker is one process",
)
_DEMO_TOKENS = 64  # at least as many as an answer to one of these has
_MOST_DEMO_PROMPT = 56  # tokens of the longest of these
TEXTS = ("lines", "sums", "edits")
KINDS = (*TEXTS, "random")


@dataclass(frozen=True)
class SpeculationPrompts:
    """Prompts of one kind; each turn begins with another of them.

    Args:
        kind: of ``KINDS``. Texts are for the demo model, which ends its answers itself.
        num_random, num_output: tokens of a prompt of random tokens, and of what follows it.
        vocab_size: these are drawn from it.
    """

    kind: str
    num_random: int
    num_output: int
    vocab_size: int

    @property
    def num_positions(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return _MOST_DEMO_PROMPT + _DEMO_TOKENS if self.kind in TEXTS else self.num_random + self.num_output

    @property
    def params(self) -> SamplingParams:
        """Greedy."""
        if self.kind in TEXTS:
            return SamplingParams(max_tokens=_DEMO_TOKENS, temperature=0.0)
        return SamplingParams(max_tokens=self.num_output, temperature=0.0, ignore_eos=True)

    def draw(self, turn: int, count: int) -> Sequence[Prompt]:
        """Return ``count`` prompts of a turn."""
        random = np.random.default_rng(turn)
        if self.kind == "random":
            drawn: list[list[int]] = random.integers(0, self.vocab_size, (count, self.num_random)).tolist()
            return drawn
        if self.kind == "sums":
            return [f"{first}+{second}=" for first, second in random.integers(100, 1000, (count, 2)).tolist()]
        texts = _LINES if self.kind == "lines" else _EDITS
        return [texts[(turn + number) % len(texts)] for number in range(count)]
