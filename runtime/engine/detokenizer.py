"""Text from tokens that arrive a few at a time, with the stop texts of the request found and cut."""

from __future__ import annotations

from collections.abc import Sequence

from ...config import SamplingParams
from .stops import StopMatcher
from .token_text import build_token_text
from .tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence, with its stop texts found and cut.

    Args:
        tokenizer: of the checkpoint.
        prompt_token_ids: the prompt, whose end decides how the first output token is written; not part of ``text``.
        params: ``stop`` and ``min_tokens`` of the request.

    Attributes:
        text: what may be shown; only grows.
        num_tokens: tokens that ``text`` stands for, those of the stop included; later ones of the same push were dropped.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self.text = ""
        self.num_tokens = 0
        self._next = build_token_text(tokenizer, prompt_token_ids)
        self._stops = StopMatcher(params.stop) if params.stop else None
        self._min_tokens = params.min_tokens

    def push(self, token_ids: Sequence[int], finish_reason: str | None = None) -> str | None:
        """Add the next tokens to ``text``; return the stop text that they completed, if any.

        Args:
            token_ids: in order.
            finish_reason: as the scheduler found it; "stop" leaves out the last token, which is the one that ended the
                sequence, and any reason brings out the text that was held back.
        """
        shown = token_ids[:-1] if finish_reason == "stop" else token_ids
        for token in shown:
            self.num_tokens += 1
            stop = self._show(self._next.push(token))
            if stop is not None:
                return stop
        self.num_tokens += len(token_ids) - len(shown)
        return None if finish_reason is None else self.flush()

    def flush(self) -> str | None:
        """Bring out text that was held back for the rest of a character or of a stop text, at the end of the sequence."""
        stop = self._show(self._next.flush())
        if stop is None and self._stops is not None:
            self.text += self._stops.flush()
        return stop

    def _show(self, text: str) -> str | None:
        if self._stops is None:
            self.text += text
            return None
        shown, stop = self._stops.push(text, may_stop=self.num_tokens > self._min_tokens)
        self.text += shown
        return stop
