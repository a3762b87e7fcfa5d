"""What config.json says of a model without a module of ours, which is computed by Transformers' own modelling code.

The driver has no Transformers, so this reads what it needs and no more: whether each tensor has its shape, and what a field that is
left out stands for, is known only once the ranks have built the model (see models/transformers_architecture.py). Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config_fields import Fields, shown
from .errors import CheckpointError, ConfigError, TopologyError
from .model_config import ARCHITECTURES, STORED_DTYPES, ModelConfig, check_checkpoint, check_tensor_parallel, read_model_config
from .model_sizes import MAX_HEADS, MAX_LAYERS, ModelSizes, read_dtype, read_eos, refuse_quantized
from .safetensors_files import find_tensors, read_json_object, read_safetensors_header

_SUFFIX = "ForCausalLM"
_RECURRENT = ("Mamba", "Rwkv", "Jamba", "Bamba", "Zamba", "NemotronH", "FalconH1", "RecurrentGemma", "Lfm2", "KimiLinear", "Qwen3Next")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_CAPPED = ("attn_logit_softcapping", "attn_logit_softcap")


@dataclass(frozen=True, kw_only=True)
class TransformersConfig(ModelSizes):
    """The sizes of a model that Transformers computes.

    ``max_steady_positions`` is the longest context up to which rotary frequencies are the same for every request; None where they
    always are. Beyond it Transformers takes those of the longest request for all that are computed with it.
    """

    model_type: str
    max_steady_positions: int | None = None


def read_any_config(directory: Path) -> ModelConfig | TransformersConfig:
    """Read config.json of a model of ours, or of another architecture that Transformers may have.

    Raises:
        CheckpointError: as ``read_model_config``; or another architecture that is no decoder with plain attention, as far as
            config.json says so.
    """
    if not directory.is_dir():
        return read_model_config(directory)  # which says so
    path = directory / "config.json"
    fields = Fields(read_json_object(path), str(path))
    names = fields.values.get("architectures")
    first = names[0] if isinstance(names, list) and names else None
    if not isinstance(first, str) or first in ARCHITECTURES or not first.endswith(_SUFFIX) or first.startswith(_RECURRENT):
        return read_model_config(directory)  # which takes it or says what would do
    return _read_foreign(directory, fields, first)


def check_any_tensor_parallel(config: ModelConfig | TransformersConfig, tp: int) -> None:
    """Check that ``tp`` ranks can share each layer, as ``check_tensor_parallel`` does; of a model of Transformers the heads only.

    Raises:
        TopologyError: they cannot; names the sizes that work.
    """
    if isinstance(config, ModelConfig):
        check_tensor_parallel(config, tp)
    else:
        check_foreign_tensor_parallel(config, tp)


def check_any_checkpoint(directory: Path, config: ModelConfig | TransformersConfig) -> None:
    """Check the files of ``directory``, as ``check_checkpoint`` does; of a model that Transformers computes only that they are whole.

    Raises:
        CheckpointError: they cannot be loaded; names the file or tensor.
    """
    if isinstance(config, ModelConfig):
        check_checkpoint(directory, config)
    else:
        _check_files(directory)


def check_steady_positions(config: TransformersConfig, max_model_len: int) -> None:
    """Check that requests of up to ``max_model_len`` positions are computed alike whatever they are computed with.

    Raises:
        ConfigError: they are not; names the length up to which they are.
    """
    steady = config.max_steady_positions
    if steady is not None and max_model_len > steady:
        raise ConfigError(
            f"max_model_len is {max_model_len}, and beyond {steady} positions Transformers' {config.architecture} changes its rotary "
            f"frequencies (longrope) for all requests of a step: set max_model_len to {steady} at most"
        )


def check_foreign_tensor_parallel(config: TransformersConfig, tp: int) -> None:
    """Check that ``tp`` ranks can share the heads; whether it divides the other layers is known once the model is built.

    Raises:
        TopologyError: ``tp`` does not divide heads and KV heads; names the sizes that work.
    """
    heads, kv_heads = config.num_heads, config.num_kv_heads
    works = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and heads % n == 0]
    if tp not in works:
        raise TopologyError(
            f"tp {tp} must divide {heads} heads and {kv_heads} KV heads of {config.architecture}, which runs through Transformers; "
            f"choose one of {', '.join(map(str, works))}"
        )


def _check_files(directory: Path) -> None:
    """Names and shapes of tensors are not known here."""
    headers = [read_safetensors_header(path) for path in dict.fromkeys(find_tensors(directory).values())]
    if not any(tensor.dtype in STORED_DTYPES for header in headers for tensor in header.values()):
        raise CheckpointError(f"{directory} has no tensor in {', '.join(STORED_DTYPES)}; convert the checkpoint")


def _read_foreign(directory: Path, fields: Fields, architecture: str) -> TransformersConfig:
    refuse_quantized(fields)
    _refuse_features(fields, architecture)
    num_heads = fields.whole("num_attention_heads", high=MAX_HEADS)
    num_kv_heads = fields.whole("num_key_value_heads", num_heads, high=MAX_HEADS)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{fields.where}: num_key_value_heads {num_kv_heads} does not divide num_attention_heads {num_heads}")
    model_type = fields.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{fields.where}: model_type is {shown(model_type)}; it must be Transformers' name of the family")
    return TransformersConfig(
        architecture=architecture,
        model_type=model_type,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        num_layers=fields.whole("num_hidden_layers", high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=fields.whole("head_dim", max(1, fields.whole("hidden_size") // num_heads)),
        max_position_embeddings=fields.whole("max_position_embeddings"),
        dtype=read_dtype(fields),
        eos_token_ids=read_eos(directory, fields),
        max_steady_positions=_read_steady_positions(fields),
    )


def _refuse_features(fields: Fields, architecture: str) -> None:
    """Refuse by name what the paged attention cannot do; the ranks refuse the rest when they try the model out."""
    values = fields.values
    kinds = fields.get("layer_types", [])
    odd = [kind for kind in kinds if kind not in _LAYER_TYPES] if isinstance(kinds, list) else [kinds]
    experts = [name for name in _EXPERTS if values.get(name)]
    caps = [name for name in _CAPPED if values.get(name) is not None]
    found = next(
        (
            what
            for what, is_there in (
                ("is an encoder and a decoder (is_encoder_decoder)", values.get("is_encoder_decoder")),
                ("attends to another input (add_cross_attention)", values.get("add_cross_attention")),
                ("has ALiBi positions (alibi)", values.get("alibi")),
                (f"caps attention scores ({', '.join(caps)})", caps),
                (f"has a mixture of experts ({', '.join(experts)})", experts),
                (f"has layers of type {', '.join(map(shown, odd[:3]))} (layer_types)", odd),
            )
            if is_there
        ),
        None,
    )
    if found is not None:
        raise CheckpointError(
            f"{fields.where}: {architecture} {found}, which is not supported through Transformers' code; models with modules of zspmd's "
            f"own are {', '.join(ARCHITECTURES)}"
        )


def _read_steady_positions(fields: Fields) -> int | None:
    """Return the positions up to which "longrope" takes its short factors, which Transformers chooses anew for each step."""
    rope = fields.object("rope_parameters" if fields.values.get("rope_parameters") is not None else "rope_scaling")
    ropes = [rope, *(rope.object(name) for name, value in rope.values.items() if isinstance(value, dict))]  # one for all, or by layer type
    limits = [
        one.whole("original_max_position_embeddings", fields.whole("original_max_position_embeddings", 0, low=0) or None)
        for one in ropes
        if one.get("rope_type", one.get("type", "default")) == "longrope"
    ]
    return min(limits, default=None)
