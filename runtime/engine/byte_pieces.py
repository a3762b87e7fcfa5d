"""What each token of a byte-level tokenizer stands for, looked up once.

Such a vocabulary writes every byte as one letter (GPT-2's ``bytes_to_unicode``: printable bytes as themselves, the others as letters
from U+0100 on), and decoding is nothing but the tokens' bytes in a row, read as UTF-8. So a token's part does not depend on its
neighbours, and where it is whole characters it is text once and for all.
"""

from __future__ import annotations

from collections.abc import Collection

import tokenizers

_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = tuple(byte for byte in range(0x100) if byte not in _PRINTABLE)
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + place): byte for place, byte in enumerate(_OTHERS)}


class BytePieces(dict[int, str | bytes]):
    """By token id: its text, or its bytes where they are no whole characters; special tokens and ids beyond the vocabulary have none.

    Raises, on a look-up:
        OverflowError: an id that is negative.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_token_ids: Collection[int]) -> None:
        super().__init__()
        self._backend = backend
        self._special_token_ids = special_token_ids

    def __missing__(self, token: int) -> str | bytes:
        letters = self._backend.id_to_token(token)
        if letters is None:
            return ""  # not kept: ids without a token are without end
        piece = self[token] = "" if token in self._special_token_ids else _read(letters)
        return piece


def _read(letters: str) -> str | bytes:
    """Return what a token's letters stand for; one with a letter that is no byte's, as added tokens may have, stands for itself."""
    if not all(letter in _BYTE_OF for letter in letters):
        return letters
    data = bytes(_BYTE_OF[letter] for letter in letters)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
