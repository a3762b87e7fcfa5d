"""What ``Engine.generate`` yields. Each output is cumulative: it holds everything since the request began.

They belong to whoever gets them. Not frozen, since that makes them three times as slow to make, and there is one for each token.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenLogprob:
    """A sampled token's log-probability, and those of the ``SamplingParams.logprobs`` likeliest tokens, likeliest first."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's ``n`` completions.

    Attributes:
        index: its place among them.
        text: without the text that ended it; empty where the engine has no tokenizer.
        token_ids: with the token that ended it.
        finish_reason: "stop", "length" or "abort"; None while it runs.
        stop_reason: the stop token or stop text that ended it; None for end of sequence and for other reasons.
        logprobs: one for each of ``token_ids`` where they were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass(slots=True)
class RequestMetrics:
    """What speculation did for a request, over all its completions.

    Attributes:
        num_steps: rows of the target that sampled for it, the one at the end of the prompt included.
        num_drafted: tokens that were proposed and verified; ``num_accepted`` of them were kept.
    """

    num_steps: int
    num_drafted: int
    num_accepted: int

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a row of the target brought on average: 1 without speculation."""
        return 1 + self.num_accepted / max(1, self.num_steps)


@dataclass(slots=True)
class RequestOutput:
    """The state of a request. ``text``, ``token_ids`` and ``finish_reason`` are the first completion's.

    Attributes:
        prompt: as text, where it was given as text or chat messages.
        prompt_token_ids: as the model sees it.
        outputs: ``n`` completions, by index.
        finished: nothing will be added to any of them.
        metrics: of speculation; None without.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason
