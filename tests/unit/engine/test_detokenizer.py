"""Detokenizer: text in steps equals text at once."""

from __future__ import annotations

import itertools
import random

import pytest

from zspmd.config import SamplingParams
from zspmd.runtime.engine.detokenizer import Detokenizer
from zspmd.runtime.engine.tokenizer import Tokenizer

TEXTS = ["The quick brown fox.", "Zwölf Boxkämpfer", "你好，世界", "a😀b👍🏽c", "two  spaces and one behind ", "line\n\nline\ttab"]
PLAIN = SamplingParams()


def stream(tokenizer: Tokenizer, tokens: list[int], prompt: list[int], params: SamplingParams = PLAIN) -> list[str]:
    """The text after each token, and after the end."""
    detokenizer = Detokenizer(tokenizer, prompt, params)
    texts = []
    for token in tokens:
        assert detokenizer.push([token]) is None
        texts.append(detokenizer.text)
    detokenizer.flush()
    return [*texts, detokenizer.text]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_whole_characters_appear_one_after_the_other(request: pytest.FixtureRequest, kind: str, text: str) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    tokens = [token for token in tokenizer.encode(text) if token not in tokenizer.special_token_ids]
    texts = stream(tokenizer, tokens, [])
    assert texts[-1] == tokenizer.decode(tokens) == text
    for before, after in itertools.pairwise(texts):
        assert after.startswith(before)
        assert "\ufffd" not in after


@pytest.mark.parametrize("text", ["é", "你", "😀"], ids=["two bytes", "three bytes", "four bytes"])
def test_a_character_appears_with_its_last_token(byte_fallback: Tokenizer, text: str) -> None:
    *earlier, with_last, at_end = stream(byte_fallback, byte_fallback.encode(text), [])
    assert (set(earlier), with_last, at_end) == ({""}, text, text)


@pytest.mark.parametrize("seed", range(40))
def test_any_bytes_give_the_text_of_one_decode(byte_level: Tokenizer, seed: int) -> None:
    chance = random.Random(seed)
    tokens = [chance.randrange(byte_level.vocab_size) for _ in range(60)]
    prompt = byte_level.encode("some prompt")
    assert stream(byte_level, tokens, prompt)[-1] == byte_level.decode(prompt + tokens)[len("some prompt") :]


@pytest.mark.parametrize("seed", range(10))
def test_bytes_that_are_no_character_neither_fail_nor_hold_the_text_back(byte_fallback: Tokenizer, seed: int) -> None:
    chance = random.Random(seed)
    invalid = [3 + chance.randrange(0x80, 0x100) for _ in range(50)]
    texts = stream(byte_fallback, [*invalid, *byte_fallback.encode("Hello world")], [])
    assert texts[-1].endswith(" Hello world")
    assert len(texts[49]) > 10


def test_the_prompt_decides_whether_the_first_space_is_kept(byte_fallback: Tokenizer) -> None:
    world = byte_fallback.encode("Hello world")[1:]
    assert stream(byte_fallback, world, [])[-1] == "world"
    assert stream(byte_fallback, world, byte_fallback.encode("Hello"))[-1] == " world"


def test_special_tokens_are_not_shown_and_change_nothing_around_them(byte_fallback: Tokenizer) -> None:
    hello, world = byte_fallback.encode("Hello world")
    end = 2
    assert stream(byte_fallback, [end, hello, end, end, world, end], [])[-1] == "Hello world"


def test_half_a_character_at_the_end_is_flushed(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("ö€")[1:]
    whole = byte_level.decode(tokens)
    assert whole == "ö€"
    texts = stream(byte_level, tokens[:-1], [])
    assert (texts[-2], texts[-1]) == ("ö", "ö\ufffd")


def test_a_stop_text_is_cut_and_reported(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("one STOP two")[1:]
    detokenizer = Detokenizer(byte_level, [], SamplingParams(stop=["STOP", "two"]))
    assert detokenizer.push(tokens) == "STOP"
    assert detokenizer.text == "one "
    assert byte_level.decode(tokens[: detokenizer.num_tokens]) == "one STOP", "later tokens of the push were dropped"


def test_text_that_may_begin_a_stop_waits_for_the_end(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, [], SamplingParams(stop="STOP"))
    tokens = byte_level.encode("one ST")[1:]
    assert detokenizer.push(tokens) is None
    assert detokenizer.text == "one "
    assert detokenizer.push([], "length") is None
    assert detokenizer.text == "one ST"


def test_the_token_that_ended_the_sequence_is_not_shown(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, [], SamplingParams(stop="STOP", stop_token_ids=[5]))
    tokens = byte_level.encode("a S.")[1:]
    assert detokenizer.push(tokens, "stop") is None
    assert (detokenizer.text, detokenizer.num_tokens) == ("a S", len(tokens))


def test_a_stop_completed_by_the_last_token_allowed_is_reported(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, [], SamplingParams(stop="P"))
    assert detokenizer.push(byte_level.encode("STOP")[1:], "length") == "P"
    assert detokenizer.text == "STO"


def test_no_stop_text_counts_before_min_tokens(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("x")[1:]
    detokenizer = Detokenizer(byte_level, [], SamplingParams(stop="x", min_tokens=2))
    assert [detokenizer.push(tokens) for _ in range(3)] == [None, None, "x"]
    assert detokenizer.text == "xx"
