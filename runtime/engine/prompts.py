"""From what a caller gives as a prompt to checked token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RequestError
from .checkpoint import Checkpoint

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


def encode_prompt(prompt: Prompt, checkpoint: Checkpoint) -> tuple[str | None, list[int]]:
    """Return the prompt's text, if it has one, and its tokens.

    Args:
        prompt: text, token ids, or chat messages.
        checkpoint: whose tokenizer, template and vocabulary count.

    Raises:
        RequestError: an empty prompt, a token outside the vocabulary, text without a tokenizer, or nothing of the three kinds.
    """
    tokenizer, text = checkpoint.tokenizer, None
    if not isinstance(prompt, str) and not _is_chat(prompt):
        token_ids = _whole_numbers(prompt)
    elif tokenizer is None:
        raise RequestError(f"{checkpoint.directory} has no tokenizer.json; give the prompt as token ids")
    elif isinstance(prompt, str):
        text, token_ids = prompt, tokenizer.encode(prompt)
    else:
        text = tokenizer.render_chat(prompt)  # type: ignore[arg-type]  # mappings by the check above, or it says no
        token_ids = tokenizer.encode(text, add_special_tokens=False)
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token of text")
    limit = checkpoint.model.vocab_size
    if (highest := max(token_ids)) >= limit or min(token_ids) < 0:
        worst = highest if highest >= limit else min(token_ids)
        raise RequestError(f"token id {worst} of the prompt is outside the vocabulary: give ids from 0 to {limit - 1}")
    return text, token_ids


def _is_chat(prompt: Prompt) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _whole_numbers(prompt: Any) -> list[int]:
    """Return token ids as int, from any iterable of whole numbers; ``int()`` would cut floats down without a word."""
    if isinstance(prompt, (bytes, bytearray, memoryview)):
        raise RequestError(f"the prompt is a {type(prompt).__name__}; decode it to text, or give a list of token ids")
    try:
        if any(isinstance(token, bool) for token in prompt):
            raise TypeError("it holds a bool")
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise RequestError(f"the prompt is no text, list of token ids or list of chat messages: {error}") from error
