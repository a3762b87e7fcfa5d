"""What a side of ``bench engine`` is asked to generate, and what it says of how that went.

One turn is a batch of prompts of one length, submitted together, from each of which as many tokens are generated greedily, whatever
they are. Every side gets the same prompts and takes its own times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ....errors import BadFrameError


@dataclass(frozen=True)
class Workload:
    """The turns of one case.

    Args:
        batch: prompts in a turn.
        num_prompt: tokens of a prompt.
        num_output: tokens that each prompt gets; at least 2.
        vocab_size: prompts are drawn from it.
        seed: of the prompts.
    """

    batch: int
    num_prompt: int
    num_output: int
    vocab_size: int
    seed: int = 0

    def prompts(self, turn: int) -> list[list[int]]:
        """Return the prompts of a turn, those of no other: a prefix cache must not help."""
        random = np.random.default_rng((self.seed, turn))
        drawn: list[list[int]] = random.integers(0, self.vocab_size, (self.batch, self.num_prompt)).tolist()
        return drawn


@dataclass(frozen=True)
class Turn:
    """How one turn went, in seconds since the prompts were handed over; on the clock of whoever ran it.

    Attributes:
        first_s: by prompt, when its first token was there.
        last_s: by prompt, when its last token was there.
        gaps_s: between neighbouring tokens of one prompt, of all prompts together.
        token_ids: by prompt.
    """

    first_s: list[float]
    last_s: list[float]
    gaps_s: list[float]
    token_ids: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def tokens_per_s(self) -> float:
        """All tokens over all of the time, prompts included."""
        return self.num_tokens / max(self.last_s)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens behind the first ones over the time that passed since every prompt had its first."""
        return (self.num_tokens - len(self.token_ids)) / (max(self.last_s) - max(self.first_s))

    @property
    def per_token_s(self) -> list[float]:
        """By prompt, the time for each token behind its first."""
        return [(last - first) / (len(tokens) - 1) for first, last, tokens in zip(self.first_s, self.last_s, self.token_ids)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Turn:
        """Read what ``to_json`` returned.

        Raises:
            BadFrameError: it is something else.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise BadFrameError(f"{fields!s:.200} was answered where a turn was expected: {error}") from error


def turn_from_times(times_s: Sequence[Sequence[float]], token_ids: list[list[int]]) -> Turn:
    """Return a turn from when each prompt's tokens were there, in seconds since the start."""
    gaps = [later - earlier for times in times_s for earlier, later in pairwise(times)]
    return Turn([times[0] for times in times_s], [times[-1] for times in times_s], gaps, token_ids)


def turn_in_step(times_s: Sequence[float], token_ids: list[list[int]]) -> Turn:
    """Return a turn in which all prompts get their tokens together; ``times_s`` by token."""
    gaps = [later - earlier for earlier, later in pairwise(times_s)]
    return Turn([times_s[0]] * len(token_ids), [times_s[-1]] * len(token_ids), gaps, token_ids)
