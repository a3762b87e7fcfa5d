"""A request as its caller sees it: its sequences, their text, and the latest state for whoever iterates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from ...config import SamplingParams
from .detokenizer import Detokenizer
from .outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from .request import I32Array, Sequence
from .tokenizer import Tokenizer
from .wakeup import Wakeup


@dataclass
class Completion:
    """One of a request's completions: its sequence, its text so far, and log-probabilities where they were asked for."""

    sequence: Sequence
    detokenizer: Detokenizer | None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def push(self, token_ids: list[int], finish_reason: str | None) -> str | None:
        """Take in new tokens; returns the stop text that they completed, if any, and drops those behind it."""
        if self.detokenizer is None:
            return None
        stop = self.detokenizer.push(token_ids, finish_reason)
        if stop is not None:
            del self.sequence.output_token_ids[self.detokenizer.num_tokens :]
            del self.logprobs[self.detokenizer.num_tokens :]
        return stop

    def snapshot(self) -> CompletionOutput:
        """Return everything since the request began."""
        sequence = self.sequence
        return CompletionOutput(
            sequence.index,
            "" if self.detokenizer is None else self.detokenizer.text,
            sequence.output_token_ids.copy(),
            sequence.finish_reason,
            sequence.stop_reason,
            None if sequence.params.logprobs is None else self.logprobs.copy(),
        )


class RequestStream:
    """Hands a request's state to one consumer. Outputs are cumulative, so a slow consumer skips states and misses nothing."""

    def __init__(self, request_id: str, prompt: str | None, prompt_token_ids: list[int], completions: SequenceOf[Completion]) -> None:
        self.request_id = request_id
        self.completions = completions
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._changed = Wakeup()
        self._error: Exception | None = None

    @property
    def is_finished(self) -> bool:
        return all(completion.sequence.is_finished for completion in self.completions)

    def notify(self) -> None:
        """Say that a completion has changed."""
        self._changed.set()

    def fail(self, error: Exception) -> None:
        """Have the consumer raise ``error``, if it has neither all there is to come nor an error already."""
        if self._error is None and not self.is_finished:
            self._error = error
            self._changed.set()

    async def next_output(self) -> RequestOutput:
        """Wait for a change and return the state; raises what ``fail`` was given."""
        await self._changed.wait()
        if self._error is not None:
            raise self._error.with_traceback(None)  # one error for many consumers: each begins its own traceback
        outputs, is_finished, num_steps, num_drafted, num_accepted = [], True, 0, 0, 0
        for completion in self.completions:
            output, sequence = completion.snapshot(), completion.sequence
            outputs.append(output)
            is_finished = is_finished and output.finish_reason is not None
            num_steps += sequence.num_steps
            num_drafted += sequence.num_drafted
            num_accepted += sequence.num_accepted
        metrics = RequestMetrics(num_steps, num_drafted, num_accepted) if num_steps else None
        return RequestOutput(self.request_id, self._prompt, self._prompt_token_ids, outputs, is_finished, metrics)


def build_stream(
    request_id: str, prompt: str | None, prompt_token_ids: list[int], params: SamplingParams, seed: int, tokenizer: Tokenizer | None
) -> RequestStream:
    """Return a request with its ``params.n`` sequences; each draws from a seed of its own.

    Raises:
        RequestError: an empty prompt.
    """
    tokens: I32Array = np.array(prompt_token_ids, np.int32)
    completions = []
    for index in range(params.n):
        sequence = Sequence(f"{request_id}/{index}", request_id, tokens, params, completion_seed(seed, index), index)
        detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt_token_ids, params)
        completions.append(Completion(sequence, detokenizer))
    return RequestStream(request_id, prompt, prompt_token_ids, completions)


def completion_seed(seed: int, index: int) -> int:
    """Return the seed of a request's completion: the request's own for the first, a hash of both for the others."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
