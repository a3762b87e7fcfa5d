"""What travels between the engine and its ranks' model workers: the value of a step, and the answer to it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...transport.batch import encode_batch_step
from .outputs import TokenLogprob
from .plan import ScheduledStep


@dataclass(frozen=True)
class Verified:
    """What the drafts of a step came to.

    Args:
        counts: uint8, the tokens of each sampled sequence; None where each has one, since no drafts were asked for.
        num_drafts: uint8, the drafts of each; None where counts is.
        report: [drafts asked for, nanoseconds to propose, nanoseconds of the rest].
    """

    counts: npt.NDArray[np.uint8] | None
    num_drafts: npt.NDArray[np.uint8] | None
    report: Sequence[int]


@dataclass(frozen=True)
class StepAnswer:
    """The answer to a step.

    Args:
        token_ids: int32, those of each sampled sequence, one sequence after another.
        verified: None where nothing was proposed, and each sequence has one token.
    """

    token_ids: npt.NDArray[np.int32]
    verified: Verified | None
    _logprobs: list[Any] | None

    @classmethod
    def read(cls, value: Sequence[Any]) -> StepAnswer:
        """Take apart what ``ModelWorker.step`` has returned."""
        token_ids, logprobs, *verified = value
        return cls(token_ids, Verified(*verified) if verified else None, logprobs)

    def logprobs_of(self, step: ScheduledStep) -> dict[int, list[TokenLogprob]]:
        """Return, by the ``id`` of each sequence of ``step`` that asked for them, the log-probabilities of its tokens."""
        if self._logprobs is None:
            return {}
        several = None if self.verified is None else self.verified.counts
        counts = [1] * len(step.sampled) if several is None else several.tolist()
        tokens, found = self.token_ids.tolist(), {}
        for sequence, end, count in zip(step.sampled, itertools.accumulate(counts), counts):
            rows = zip(tokens[end - count : end], self._logprobs[end - count : end])
            found[id(sequence)] = [TokenLogprob(token, row[0], dict(row[1])) for token, row in rows if row is not None]
        return found


def encode_steps(steps: Sequence[ScheduledStep], num_replicas: int) -> bytes | list[list[Any]]:
    """Return what is published: a step, or with several replicas the tokens that each computes and its step, None for none."""
    if num_replicas == 1:
        return encode_batch_step(steps[0].batch)
    num_tokens: list[Any] = [0] * num_replicas
    parts: list[Any] = [None] * num_replicas
    for step in steps:
        num_tokens[step.replica], parts[step.replica] = step.num_tokens, encode_batch_step(step.batch)
    return [num_tokens, parts]
