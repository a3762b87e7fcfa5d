"""Tiny tokenizers of the two kinds that checkpoints have, made on the spot."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from zspmd.runtime.engine.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Deich. ",
    "你好，世界 😀👍🏽 ",
] * 20


def build_byte_level_backend() -> tokenizers.Tokenizer:
    """GPT-2's kind: every byte is a token, a character may span several; BOS before each prompt."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    return backend


def build_byte_fallback_backend() -> tokenizers.Tokenizer:
    """Llama's kind: words begin with a mark, unknown characters become byte tokens, the first space is stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "a", "b", "!"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True, ignore_merges=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return Tokenizer(build_byte_level_backend())


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    return Tokenizer(build_byte_fallback_backend())


@pytest.fixture(scope="session")
def byte_level_backend() -> tokenizers.Tokenizer:
    return build_byte_level_backend()
