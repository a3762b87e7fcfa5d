"""Models of random weights, for measuring where no checkpoint is at hand: a Llama of a named size, written into a directory.

The weights are drawn from a seed, so that the same name gives the same files. Without torch: NumPy draws, and this module writes the
safetensors file itself, a tensor at a time.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ....errors import ConfigError

# "tiny" is for trying a command out.
SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "5m": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "30m": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
}
MAX_POSITIONS = 2048
_ALIGNMENT = 8
_STD = 0.04  # logits of a few units: neither flat nor a single token for ever


def write_random_checkpoint(directory: Path, size: str, *, seed: int = 0) -> Path:
    """Write config.json, model.safetensors (float32) and tokenizer.json of a random Llama; returns ``directory``, made if need be.

    Its tokens are the single bytes and, for the rest of its vocabulary, pairs of them. None of them ends a sequence.

    Args:
        size: a key of ``SIZES``.

    Raises:
        ConfigError: there is no such size.
    """
    if size not in SIZES:
        raise ConfigError(f"no random model is called {size!r}; choose one of {', '.join(SIZES)}")
    fields = SIZES[size]
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **fields,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _build_tokenizer(fields["vocab_size"]).save(str(directory / "tokenizer.json"))
    write_random_tensors(directory / "model.safetensors", dict(_shapes(fields)), np.random.default_rng(seed))
    return directory


def num_parameters(size: str) -> int:
    """Return how many weights a size of ``SIZES`` has."""
    return sum(math.prod(shape) for _, shape in _shapes(SIZES[size]))


def _shapes(fields: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, mlp, vocabulary = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    kv = hidden // fields["num_attention_heads"] * fields["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)
    for layer in range(fields["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (mlp, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (mlp, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, mlp)


def _build_tokenizer(vocab_size: int) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = itertools.islice(itertools.product(alphabet, alphabet), vocab_size - len(alphabet))
    merges = [(first, second) for first, second in pairs]
    tokens = [*alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_random_tensors(path: Path, shapes: dict[str, tuple[int, ...]], random: np.random.Generator) -> None:
    """Write a safetensors file of random float32 matrices and vectors of ones."""
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            weights = np.ones(shape, np.float32) if len(shape) == 1 else random.standard_normal(shape, np.float32) * np.float32(_STD)
            file.write(weights.astype("<f4", copy=False).tobytes())
