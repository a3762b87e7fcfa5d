"""The text that a sequence's next token adds, never half a character; two ways, chosen by how the tokenizer decodes.

    ByteText     the tokens are bytes (GPT-2, Llama 3, Qwen, DeepSeek): a look-up, and UTF-8 decoded as it comes
    WindowText   any other: a small window of the latest tokens is decoded again at each token, and what is new in its text counts

The window begins with tokens that were shown already, since decoders treat the first token otherwise (some strip its space). The
alternative, ``tokenizers.decoders.DecodeStream``, raises "Invalid prefix encountered" on byte-fallback tokens that turn out to be no
UTF-8, has no flush, and its state is lost when it raises; the window has neither trouble and costs one decode of a few tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character, or not yet one
_MAX_HELD_TOKENS = 3  # a character has up to four bytes: three tokens may complete nothing, the fourth must
_NUM_CONTEXT_TOKENS = 8
_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class TokenText(Protocol):
    """Where the text of one sequence comes from."""

    def push(self, token: int) -> str:
        """Return what the next token adds: nothing while its last character is not whole."""

    def flush(self) -> str:
        """Return what was held back for the rest of a character, at the end of the sequence; a second time there is none."""


def build_token_text(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> TokenText:
    """Return the text of a sequence behind its prompt, whose end decides how the first output token is written."""
    context = [int(token) for token in prompt_token_ids[-_NUM_CONTEXT_TOKENS:]]
    pieces = tokenizer.byte_pieces
    return WindowText(tokenizer, context) if pieces is None else ByteText(pieces, context)


class ByteText:
    """Of tokens that are bytes.

    Args:
        pieces: what each token stands for: text where its bytes are whole characters.
        context: tokens before the first one that is pushed.
    """

    def __init__(self, pieces: Mapping[int, str | bytes], context: Sequence[int]) -> None:
        self._pieces = pieces
        self._decoder = _Utf8Decoder("replace")
        self._is_whole = True  # no bytes wait for the rest of their character
        for token in context:
            self.push(token)

    def push(self, token: int) -> str:
        piece = self._pieces[token]
        if type(piece) is str:
            if self._is_whole or not piece:
                return piece
            piece = piece.encode()
        text = self._decoder.decode(piece)  # type: ignore[arg-type]  # no str is left
        self._is_whole = not self._decoder.getstate()[0]
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowText:
    """Of tokens whose text depends on those before them."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = context
        self._num_shown = len(tokenizer.decode(context).rstrip(_REPLACEMENT))
        self._context_size = len(context)
        self._num_held = 0

    def push(self, token: int) -> str:
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

    def flush(self) -> str:
        held = self._tokenizer.decode(self._window)[self._num_shown :]
        self._window, self._num_shown = [], 0
        return held

    def _begin_window(self, start: int, *, num_hidden: int) -> None:
        """Forget the window's tokens before ``start``; all the rest, but its last characters, is context of what follows."""
        self._window = self._window[max(0, start) :]
        self._context_size = len(self._window)
        self._num_shown = max(0, len(self._tokenizer.decode(self._window)) - num_hidden)
