"""What a token adds to the text: by its bytes, and by decoding a window again."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers

from zspmd.errors import CheckpointError
from zspmd.runtime.engine.byte_pieces import BytePieces
from zspmd.runtime.engine.token_text import ByteText, TokenText, WindowText, build_token_text
from zspmd.runtime.engine.tokenizer import Tokenizer

ADDED = ["<tool call>", "ünique", "€5", "\ufffd"]  # with letters that are no byte's, too
SPECIAL = "<end of turn>"


@pytest.fixture(scope="module")
def added(byte_level_backend: tokenizers.Tokenizer) -> Tokenizer:
    """A byte-level tokenizer to which tokens have been added."""
    backend = tokenizers.Tokenizer.from_str(byte_level_backend.to_str())
    backend.add_tokens(ADDED)
    backend.add_special_tokens([SPECIAL])
    return Tokenizer(backend)


def run(text: TokenText, tokens: list[int]) -> str:
    return "".join(text.push(token) for token in tokens) + text.flush()


def draw(tokenizer: Tokenizer, seed: int) -> list[int]:
    """Tokens of any kind, bytes that are no characters among them, and ids that the padding of a vocabulary has."""
    chance = random.Random(seed)
    added = range(tokenizer.vocab_size - len(ADDED) - 1, tokenizer.vocab_size + 2)
    return [chance.choice(added) if chance.random() < 0.2 else chance.randrange(tokenizer.vocab_size) for _ in range(80)]


def pieces_of(tokenizer: Tokenizer) -> BytePieces:
    assert tokenizer.byte_pieces is not None
    return tokenizer.byte_pieces


WAYS: dict[str, Callable[[Tokenizer], TokenText]] = {
    "bytes": lambda tokenizer: ByteText(pieces_of(tokenizer), []),
    "window": lambda tokenizer: WindowText(tokenizer, []),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(40))
def test_any_tokens_give_the_text_of_one_decode(added: Tokenizer, way: str, seed: int) -> None:
    tokens = draw(added, seed)
    assert run(WAYS[way](added), tokens) == added.decode(tokens)


def test_every_byte_has_its_letter() -> None:
    letters = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={letter: place for place, letter in enumerate(sorted(letters))}, merges=[]))
    pieces = BytePieces(backend, ())
    found = {piece.encode() if isinstance(piece, str) else piece for piece in (pieces[token] for token in range(256))}
    assert found == {bytes([byte]) for byte in range(256)}


def test_text_is_shown_no_later_than_by_the_window(added: Tokenizer) -> None:
    for seed in range(20):
        fast, slow = ByteText(pieces_of(added), []), WindowText(added, [])
        num_fast = num_slow = 0
        for token in draw(added, seed):
            num_fast += len(fast.push(token))
            num_slow += len(slow.push(token))
            assert num_fast >= num_slow


def test_a_character_that_the_prompt_begins_belongs_to_the_output(added: Tokenizer) -> None:
    by_piece = {pieces_of(added)[token]: token for token in range(added.vocab_size)}
    assert run(build_token_text(added, [by_piece["a"], by_piece[b"\xc3"]]), [by_piece[b"\xb6"]]) == "ö"


def test_bytes_of_the_prompt_that_are_no_character_are_the_prompts(added: Tokenizer) -> None:
    pieces = pieces_of(added)
    invalid = next(token for token in range(added.vocab_size) if pieces[token] == b"\xff")
    full_stop = next(token for token in range(added.vocab_size) if pieces[token] == ".")
    assert run(build_token_text(added, [full_stop, invalid]), [full_stop]) == "."


def test_a_second_flush_has_nothing(added: Tokenizer) -> None:
    half = next(token for token in range(added.vocab_size) if pieces_of(added)[token] == b"\xc3")
    for text in (ByteText(pieces_of(added), []), WindowText(added, [])):
        assert (text.push(half), text.flush(), text.flush()) == ("", "\ufffd", "")


def test_ids_without_a_token_are_not_kept(added: Tokenizer) -> None:
    pieces = pieces_of(added)
    before = len(pieces)
    assert [pieces[token] for token in (added.vocab_size, 1 << 30)] == ["", ""]
    assert len(pieces) == before


def test_an_id_below_zero_is_refused_as_by_decode(added: Tokenizer) -> None:
    with pytest.raises(CheckpointError):
        added.decode([-1])
    with pytest.raises(OverflowError):
        pieces_of(added)[-1]


def test_only_plain_byte_level_decoding_goes_by_bytes(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    assert isinstance(build_token_text(byte_level, []), ByteText)
    assert isinstance(build_token_text(byte_fallback, []), WindowText)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    assert isinstance(build_token_text(Tokenizer(backend), []), WindowText), "no decoder joins tokens with spaces"
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(content=" ", left=1)])
    assert isinstance(build_token_text(Tokenizer(backend), []), WindowText)
