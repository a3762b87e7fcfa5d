"""Checkpoints of zeros, for what looks at shapes and never at weights; no torch here."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from zspmd.model_config import read_model_config, tensor_shapes

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def save_zeros(directory: Path, **fields: object) -> Path:
    """Write config.json with ``fields`` over a small Llama's, and the tensors that follow; return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**LLAMA, **fields}))
    header, end = {}, 0
    for name, shape in tensor_shapes(read_model_config(directory)).items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return directory
