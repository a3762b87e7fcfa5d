"""A checkpoint whose every output is known beforehand: each byte of one text is followed by the next, the last by </s>.

Attention and MLP add nothing, embeddings are unit vectors, and the head maps each of them to the token that follows. So streaming,
stop texts and characters of several bytes are tested against a text, not against what a random model happens to say.
"""

from __future__ import annotations

from pathlib import Path

import torch
from support.checkpoints import save_checkpoint, save_tokenizer
from tokenizers import pre_tokenizers

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # save_tokenizer numbers the bytes in this order


def token_ids(text: str) -> list[int]:
    """Return the tokens of a text, one for each of its UTF-8 bytes."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [ALPHABET.index(character) for piece, _ in pieces for character in piece]


TEXT = "Hé, 你😀!"
TOKENS = token_ids(TEXT)
EOS = 257
CYCLE = [*TOKENS, EOS]
VOCAB_SIZE = 258  # the bytes, <s> and </s>, as save_tokenizer has them

assert len(set(TOKENS)) == len(TOKENS), "each byte has one successor"


def save_chain_checkpoint(directory: Path, *, max_position_embeddings: int = 256) -> None:
    """Write the checkpoint with its tokenizer; tokens that are not in the text are followed by its first byte, as is </s>.

    A step's likeliest token has a logit of 16.2, all others 0: greedy is certain, and a temperature of 10 is not.
    """
    model = save_checkpoint(
        directory,
        vocab_size=VOCAB_SIZE,
        hidden_size=264,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
    )
    following = dict.fromkeys(range(VOCAB_SIZE), TOKENS[0]) | dict(zip(TOKENS, CYCLE[1:]))
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(1)
    model.model.embed_tokens.weight.copy_(torch.eye(VOCAB_SIZE, 264))
    model.lm_head.weight.zero_()
    for token, successor in following.items():
        model.lm_head.weight[successor, token] = 1
    model.save_pretrained(directory)
    save_tokenizer(directory)


def expected_tokens(count: int) -> list[int]:
    """Return the first ``count`` tokens that follow any prompt outside the text, </s> passed over as by ``ignore_eos``."""
    return [CYCLE[i % len(CYCLE)] for i in range(count)]
