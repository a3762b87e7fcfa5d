"""What the driver must know of any model, whoever computes it, and the fields of config.json that say so; standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config_fields import Fields, shown
from .errors import CheckpointError
from .mixture_config import MixtureConfig
from .safetensors_files import read_json_object

CONFIG_DTYPES = ("float32", "float16", "bfloat16")
MAX_LAYERS, MAX_HEADS = 10_000, 1 << 16  # what follows from them is listed before a tensor is looked at


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of one model, under the names of config.json.

    ``dtype`` is the one the checkpoint asks for. ``eos_token_ids`` are those of config.json and generation_config.json together. The
    layers that ``mixture`` names have a mixture of experts where the others have an MLP.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    mixture: MixtureConfig | None = None


def refuse_quantized(fields: Fields) -> None:
    """Raise CheckpointError where the weights are quantized."""
    if fields.values.get("quantization_config") is not None:
        raise CheckpointError(f"{fields.where} has a quantization_config; quantized weights are not supported, use a float checkpoint")


def read_dtype(fields: Fields) -> str:
    """Return the dtype that the checkpoint asks for, one of ``CONFIG_DTYPES``."""
    dtype = fields.get("dtype", fields.get("torch_dtype", "float32"))
    if dtype not in CONFIG_DTYPES:
        raise CheckpointError(f"{fields.where}: dtype is {shown(dtype)}; supported are {', '.join(CONFIG_DTYPES)}")
    return str(dtype)


def read_eos(directory: Path, fields: Fields) -> tuple[int, ...]:
    """Return the end-of-sequence ids of generation_config.json, where there is one, and of ``fields``."""
    sources = [fields]
    path = directory / "generation_config.json"
    if path.exists():
        sources.insert(0, Fields(read_json_object(path), str(path)))
    found: dict[int, None] = {}  # a dict keeps the order, and every rank must see the same one
    for source in sources:
        value = source.get("eos_token_id", [])
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 1 << 31:
                raise CheckpointError(f"{source.where}: eos_token_id is {shown(value)}; it must be a token id or a list of them")
            found[token] = None
    return tuple(found)
