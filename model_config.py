"""What a checkpoint directory says before a weight is read: config.json and the tensors that follow from it.

Standard library only, so that a driver refuses a bad checkpoint before any process starts.

The four families are one model whose variants are fields:

    LlamaForCausalLM      biases and rope scaling as config.json says
    MistralForCausalLM    no biases, a sliding window
    Qwen2ForCausalLM      biases on q, k and v
    Qwen3ForCausalLM      norms on each head of q and k; head_dim is free of hidden_size
"""

from __future__ import annotations

import reprlib
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError, TopologyError
from .safetensors_files import find_tensors, read_json_object, read_safetensors_header

LLAMA, MISTRAL, QWEN2, QWEN3 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
ARCHITECTURES = (LLAMA, MISTRAL, QWEN2, QWEN3)
CONFIG_DTYPES = ("float32", "float16", "bfloat16")
STORED_DTYPES = ("F32", "F16", "BF16")
_MAX_LAYERS, _MAX_HEADS = 10_000, 1 << 16  # what follows from them is listed before a tensor is looked at
_shortener = reprlib.Repr()
_shortener.maxlist = _shortener.maxdict = 8
_shortener.maxlevel = 2
_shortener.maxstring = 100


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts; ``kind`` is "linear" or "llama3", the last three are llama3's."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and variants of one model of the Llama family, under the names of config.json.

    ``attention_bias`` is the bias of q, k and v, ``output_bias`` that of the attention's output projection, ``qk_norm`` a norm
    on each head of q and k. With ``sliding_window`` W a token sees the W latest positions, its own included. ``dtype`` is the
    one the checkpoint asks for. ``eos_token_ids`` are those of config.json and generation_config.json together.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str
    eos_token_ids: tuple[int, ...]


class _Fields:
    """Typed reads from one JSON object of a file; null counts as absent."""

    def __init__(self, values: dict[str, object], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, name: str, default: object = None) -> object:
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where} has no {name}; the model cannot be built without it")
        return value

    def whole(self, name: str, default: int | None = None, *, high: int = (1 << 31) - 1) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise CheckpointError(f"{self.where}: {name} is {_shown(value)}; it must be a whole number from 1 to {high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise CheckpointError(f"{self.where}: {name} is {_shown(value)}; it must be a finite number above 0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {name} is {_shown(value)}; it must be true or false")
        return value

    def object(self, name: str) -> _Fields:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {name} is {_shown(value)}; it must be an object")
        return _Fields(value, f"{self.where}: {name}")


def _shown(value: object) -> str:
    """Return the beginning of what a file says, for an error, however large or deep it is."""
    return _shortener.repr(value)


def read_model_config(directory: Path) -> ModelConfig:
    """Read config.json, and the end-of-sequence ids of generation_config.json where there is one.

    Raises:
        CheckpointError: no such directory or file, a field that is missing or out of range, an architecture or a feature that
            is not supported. The message names the file, the field and its value.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no model directory {directory}; give a local directory with config.json and model.safetensors")
    path = directory / "config.json"
    fields = _Fields(read_json_object(path), str(path))
    architecture = _read_architecture(fields)
    _refuse_unsupported(fields)
    num_heads, num_kv_heads, head_dim = _read_heads(fields, architecture)
    theta, scaling = _read_rope(fields)
    both_biases = architecture in (LLAMA, QWEN3) and fields.flag("attention_bias")
    dtype = fields.get("dtype", fields.get("torch_dtype", "float32"))
    if dtype not in CONFIG_DTYPES:
        raise CheckpointError(f"{path}: dtype is {_shown(dtype)}; supported are {', '.join(CONFIG_DTYPES)}")
    num_layers = fields.whole("num_hidden_layers", high=_MAX_LAYERS)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.whole("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=_read_sliding_window(fields, architecture, num_layers),
        attention_bias=both_biases or architecture == QWEN2,
        output_bias=both_biases,
        mlp_bias=architecture == LLAMA and fields.flag("mlp_bias"),
        qk_norm=architecture == QWEN3,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=str(dtype),
        eos_token_ids=_read_eos(directory, fields),
    )


def _read_architecture(fields: _Fields) -> str:
    names = fields.get("architectures")
    for name in names if isinstance(names, list) else ():
        if name in ARCHITECTURES:
            return str(name)
    raise CheckpointError(f"{fields.where}: architectures is {_shown(names)}; supported are {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(fields: _Fields) -> None:
    if fields.values.get("quantization_config") is not None:
        raise CheckpointError(f"{fields.where} has a quantization_config; quantized weights are not supported, use a float checkpoint")
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{fields.where}: hidden_act is {_shown(activation)}; only 'silu' is supported")


def _read_heads(fields: _Fields, architecture: str) -> tuple[int, int, int]:
    num_heads = fields.whole("num_attention_heads", high=_MAX_HEADS)
    # Only Llama's own default is "as many as heads"; the other families always write the field.
    num_kv_heads = fields.whole("num_key_value_heads", num_heads if architecture == LLAMA else None, high=_MAX_HEADS)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{fields.where}: num_key_value_heads {num_kv_heads} does not divide num_attention_heads {num_heads}")
    head_dim = fields.whole("head_dim", 128 if architecture == QWEN3 else fields.whole("hidden_size") // num_heads)
    if head_dim % 2:
        raise CheckpointError(f"{fields.where}: head_dim is {head_dim}; rotary embedding needs an even one")
    return num_heads, num_kv_heads, head_dim


def _read_rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Transformers 5 writes one object ``rope_parameters``; older files have ``rope_theta`` beside ``rope_scaling``."""
    rope = fields.object("rope_parameters" if fields.values.get("rope_parameters") is not None else "rope_scaling")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if partial != 1:
        raise CheckpointError(f"{fields.where}: partial_rotary_factor is {partial}; only 1 is supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", rope.number("factor"))
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if not low < high:
            raise CheckpointError(f"{rope.where}: low_freq_factor {low} must be below high_freq_factor {high}")
        return theta, RopeScaling("llama3", rope.number("factor"), low, high, rope.whole("original_max_position_embeddings"))
    raise CheckpointError(f"{rope.where}: rope_type is {_shown(kind)}; supported are default, linear, llama3")


def _read_sliding_window(fields: _Fields, architecture: str, num_layers: int) -> int | None:
    if architecture == LLAMA:
        return None
    if architecture == MISTRAL:
        if "sliding_window" in fields.values and fields.values["sliding_window"] is None:
            return None
        return fields.whole("sliding_window", 4096)
    if not fields.flag("use_sliding_window") or fields.values.get("sliding_window") is None:
        return None
    first = fields.get("max_window_layers", 28)
    default = ["sliding_attention" if isinstance(first, int) and i >= first else "full_attention" for i in range(num_layers)]
    kinds = fields.get("layer_types", default)
    if kinds == ["full_attention"] * num_layers:
        return None
    if kinds == ["sliding_attention"] * num_layers:
        return fields.whole("sliding_window")
    raise CheckpointError(f"{fields.where}: layer_types mix full and sliding attention ({_shown(kinds)}); all layers must be of one kind")


def _read_eos(directory: Path, fields: _Fields) -> tuple[int, ...]:
    sources = [fields]
    path = directory / "generation_config.json"
    if path.exists():
        sources.insert(0, _Fields(read_json_object(path), str(path)))
    found: dict[int, None] = {}  # a dict keeps the order, and every rank must see the same one
    for source in sources:
        value = source.get("eos_token_id", [])
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < 1 << 31:
                raise CheckpointError(f"{source.where}: eos_token_id is {_shown(value)}; it must be a token id or a list of them")
            found[token] = None
    return tuple(found)


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Check that ``tp`` ranks can share each layer.

    Raises:
        TopologyError: ``tp`` does not divide the heads or the MLP, or fits the KV heads neither way; names the sizes that work.
    """
    heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.intermediate_size
    works = [n for n in range(1, heads + 1) if heads % n == 0 and width % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    if tp not in works:
        raise TopologyError(
            f"tp {tp} does not fit {heads} heads, {kv_heads} KV heads and intermediate_size {width}: it must divide the first and the "
            f"last, and divide the KV heads or be a multiple of them; choose one of {', '.join(map(str, works))}"
        )


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the full shape of every tensor that the checkpoint must hold, by its Hugging Face name."""
    hidden, width = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (q_rows, hidden, config.attention_bias),
        "self_attn.k_proj": (kv_rows, hidden, config.attention_bias),
        "self_attn.v_proj": (kv_rows, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, q_rows, config.output_bias),
        "mlp.gate_proj": (width, hidden, config.mlp_bias),
        "mlp.up_proj": (width, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, width, config.mlp_bias),
    }
    for prefix in (f"model.layers.{i}." for i in range(config.num_layers)):
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (hidden,)
        for name in ("self_attn.q_norm", "self_attn.k_norm") if config.qk_norm else ():
            shapes[f"{prefix}{name}.weight"] = (config.head_dim,)
    return shapes


def check_checkpoint(directory: Path, config: ModelConfig) -> None:
    """Check, without torch and without reading a weight, that every tensor of ``config`` can be loaded from ``directory``.

    Raises:
        CheckpointError: no safetensors file, one that is truncated or corrupt, or a tensor that is missing or has another shape
            or a dtype other than F32, F16 and BF16; ``tensor``, ``wanted`` and ``found`` say which, where they apply.
    """
    files = find_tensors(directory)
    headers = {path: read_safetensors_header(path) for path in dict.fromkeys(files.values())}
    for name, shape in tensor_shapes(config).items():
        if name not in files or name not in headers[files[name]]:
            where = files.get(name, directory)
            raise CheckpointError(f"{where} has no tensor {name}; the checkpoint is incomplete or of another model", tensor=name)
        stored = headers[files[name]][name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{files[name]}: {name} has shape {list(stored.shape)} where config.json asks for {list(shape)}",
                tensor=name,
                wanted=shape,
                found=stored.shape,
            )
        if stored.dtype not in STORED_DTYPES:
            wanted = ", ".join(STORED_DTYPES)
            message = f"{files[name]}: {name} is stored as {stored.dtype}; supported are {wanted}, convert the checkpoint"
            raise CheckpointError(message, tensor=name, wanted=STORED_DTYPES, found=stored.dtype)
