"""Text from tokens that arrive a few at a time, never with half a character.

A small window of the latest tokens is decoded again at each token, and what is new in its text is shown. The window begins with
tokens that were shown already, since decoders treat the first token otherwise (some strip its space). The alternative,
``tokenizers.decoders.DecodeStream``, raises "Invalid prefix encountered" on byte-fallback tokens that turn out to be no UTF-8,
has no flush, and its state is lost when it raises; the window has neither trouble and costs one decode of a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...config import SamplingParams
from .stops import StopMatcher
from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet one
_MAX_HELD_TOKENS = 3  # a character has up to four bytes: three tokens may complete nothing, the fourth must
_NUM_CONTEXT_TOKENS = 8


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
        self._tokenizer = tokenizer
        self._stops = StopMatcher(params.stop)
        self._min_tokens = params.min_tokens
        self._window = [int(token) for token in prompt_token_ids[-_NUM_CONTEXT_TOKENS:]]
        self._num_shown = len(tokenizer.decode(self._window).rstrip(_REPLACEMENT))
        self._context_size = len(self._window)
        self._num_held = 0

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
            stop = self._show(self._next_text(token))
            if stop is not None:
                return stop
        self.num_tokens += len(token_ids) - len(shown)
        return None if finish_reason is None else self.flush()

    def flush(self) -> str | None:
        """Bring out text that was held back for the rest of a character or of a stop text, at the end of the sequence."""
        stop = self._show(self._tokenizer.decode(self._window)[self._num_shown :])
        self._window, self._num_shown, self._context_size, self._num_held = [], 0, 0, 0
        if stop is None:
            self.text += self._stops.flush()
        return stop

    def _show(self, text: str) -> str | None:
        shown, stop = self._stops.push(text, may_stop=self.num_tokens > self._min_tokens)
        self.text += shown
        return stop

    def _next_text(self, token: int) -> str:
        if token in self._tokenizer.special_token_ids:
            return ""  # as in decode(), but a run of them must not lengthen the window
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        whole = len(text.rstrip(_REPLACEMENT))
        is_stuck = self._num_held == _MAX_HELD_TOKENS and whole < len(text)
        whole = len(text) - 1 if is_stuck else whole
        if whole <= self._num_shown:
            self._num_held = 0 if is_stuck else self._num_held + (whole < len(text))
            return ""
        new = text[self._num_shown : whole]
        self._num_shown = whole
        self._num_held = 0
        if is_stuck:
            self._begin_window(len(self._window) - _NUM_CONTEXT_TOKENS, num_hidden=1)
        elif whole == len(text):
            self._begin_window(self._context_size, num_hidden=0)
        return new

    def _begin_window(self, start: int, *, num_hidden: int) -> None:
        """Forget the window's tokens before ``start``; all the rest, but its last characters, is context of what follows."""
        self._window = self._window[max(0, start) :]
        self._context_size = len(self._window)
        self._num_shown = max(0, len(self._tokenizer.decode(self._window)) - num_hidden)
