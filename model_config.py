"""What a checkpoint directory says before a weight is read: config.json and the tensors that follow from it.

Standard library only, so that a driver refuses a bad checkpoint before any process starts.

The families are one model whose variants are fields:

    LlamaForCausalLM       biases and rope scaling as config.json says
    MistralForCausalLM     no biases, a sliding window
    Qwen2ForCausalLM       biases on q, k and v
    Qwen3ForCausalLM       norms on each head of q and k; head_dim is free of hidden_size
    MixtralForCausalLM     Mistral's attention; mixtures of experts instead of the MLPs, see mixture_config.py
    Qwen2MoeForCausalLM    Qwen2's attention and mixtures
    Qwen3MoeForCausalLM    Qwen3's attention and mixtures
    Dots1ForCausalLM       Qwen3's attention and DeepSeek-V3's mixtures
    Glm4MoeForCausalLM     the same mixtures; half of each head's dims are rotated, biases and head norms as config.json says
    DeepseekV2ForCausalLM  latent attention, see latent_config.py, and DeepSeek-V2's mixtures
    DeepseekV3ForCausalLM  latent attention and DeepSeek-V3's mixtures
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .config import ParallelConfig
from .config_fields import Fields, shown
from .errors import CheckpointError, TopologyError
from .latent_config import LATENTS, LatentConfig, latent_shapes, read_latent
from .mixture_config import DOTS1, GLM4_MOE, MIXTRAL, MIXTURES, QWEN2_MOE, QWEN3_MOE, MixtureConfig, mixture_shapes, read_mixture
from .model_sizes import MAX_HEADS, MAX_LAYERS, ModelSizes, read_dtype, read_eos, refuse_quantized
from .rope_config import RopeScaling, read_rope
from .safetensors_files import find_tensors, has_tensors, read_json_object, read_safetensors_header

LLAMA, MISTRAL, QWEN2, QWEN3 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"
ARCHITECTURES = (LLAMA, MISTRAL, QWEN2, QWEN3, *MIXTURES)
STORED_DTYPES = ("F32", "F16", "BF16")
_HEAD_BIASES = (LLAMA, QWEN3, QWEN3_MOE, DOTS1, *LATENTS)  # attention_bias is that of all four projections
_HEAD_NORMS = (QWEN3, QWEN3_MOE, DOTS1)
_WINDOW_FLAG = (QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE)  # sliding_window counts with use_sliding_window only
_DEFAULT_WINDOWS = dict.fromkeys((MISTRAL, QWEN3_MOE, DOTS1), 4096)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelSizes):
    """The sizes and variants of one model of the Llama family, under the names of config.json.

    ``attention_bias`` is the bias of q, k and v, ``output_bias`` that of the attention's output projection, ``qk_norm`` a norm
    on each head of q and k; the first ``rotary_dim`` dims of a head are rotated. With ``sliding_window`` W a token sees the W
    latest positions, its own included. The MLPs have width ``intermediate_size``. With ``latent`` the attention is latent attention,
    ``num_kv_heads`` is 1 and ``head_dim`` that of queries and keys.
    """

    intermediate_size: int
    rotary_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_window: int | None
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    latent: LatentConfig | None = None

    def mixture_of(self, layer: int) -> MixtureConfig | None:
        """Return the mixture that a layer has, None where it has an MLP."""
        return self.mixture if self.mixture is not None and layer in self.mixture.layers else None


def read_model_config(directory: Path) -> ModelConfig:
    """Read config.json, and the end-of-sequence ids of generation_config.json where there is one.

    Raises:
        CheckpointError: no such directory or file, a field that is missing or out of range, an architecture or a feature that
            is not supported. The message names the file, the field and its value.
    """
    if not directory.is_dir():
        raise CheckpointError(f"no model directory {directory}; give a local directory with config.json and model.safetensors")
    path = directory / "config.json"
    fields = Fields(read_json_object(path), str(path))
    architecture = _read_architecture(fields)
    _refuse_unsupported(fields, architecture)
    latent = read_latent(fields, architecture) if architecture in LATENTS else None
    num_heads, num_kv_heads, head_dim = _read_heads(fields, architecture) if latent is None else _read_latent_heads(fields, latent)
    rotary_dim, theta, scaling = read_rope(
        fields,
        head_dim if latent is None else latent.rope_dim,
        theta=1e6 if architecture == MIXTRAL else 1e4,
        part=0.5 if architecture == GLM4_MOE else None,
    )
    output_bias = architecture in _HEAD_BIASES and fields.flag("attention_bias")
    num_layers = fields.whole("num_hidden_layers", high=MAX_LAYERS)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=fields.whole("hidden_size"),
        intermediate_size=fields.whole("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        max_position_embeddings=fields.whole("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-5 if architecture in (MIXTRAL, GLM4_MOE) else 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=_read_sliding_window(fields, architecture, num_layers),
        attention_bias=output_bias or _has_qkv_bias(fields, architecture),
        output_bias=output_bias,
        mlp_bias=architecture == LLAMA and fields.flag("mlp_bias"),
        qk_norm=architecture in _HEAD_NORMS or (architecture == GLM4_MOE and fields.flag("use_qk_norm")),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=read_dtype(fields),
        eos_token_ids=read_eos(directory, fields),
        mixture=_read_mixture(directory, fields, architecture, num_layers) if architecture in MIXTURES else None,
        latent=latent,
    )


def _read_architecture(fields: Fields) -> str:
    names = fields.get("architectures")
    for name in names if isinstance(names, list) else ():
        if name in ARCHITECTURES:
            return str(name)
    raise CheckpointError(f"{fields.where}: architectures is {shown(names)}; supported are {', '.join(ARCHITECTURES)}")


def _refuse_unsupported(fields: Fields, architecture: str) -> None:
    refuse_quantized(fields)
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{fields.where}: hidden_act is {shown(activation)}; only 'silu' is supported")
    if architecture in LATENTS and fields.flag("mlp_bias"):
        raise CheckpointError(f"{fields.where}: mlp_bias is true; experts with biases are not supported")


def _read_heads(fields: Fields, architecture: str) -> tuple[int, int, int]:
    num_heads = fields.whole("num_attention_heads", high=MAX_HEADS)
    # Only Llama's own default is "as many as heads"; the other families always write the field.
    num_kv_heads = fields.whole("num_key_value_heads", num_heads if architecture == LLAMA else None, high=MAX_HEADS)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{fields.where}: num_key_value_heads {num_kv_heads} does not divide num_attention_heads {num_heads}")
    head_dim = fields.whole("head_dim", 128 if architecture == QWEN3 else fields.whole("hidden_size") // num_heads)
    if head_dim % 2:
        raise CheckpointError(f"{fields.where}: head_dim is {head_dim}; rotary embedding needs an even one")
    return num_heads, num_kv_heads, head_dim


def _read_latent_heads(fields: Fields, latent: LatentConfig) -> tuple[int, int, int]:
    """The latent counts as one KV head."""
    num_heads = fields.whole("num_attention_heads", high=MAX_HEADS)
    num_kv_heads = fields.whole("num_key_value_heads", num_heads)
    if num_kv_heads != num_heads:
        raise CheckpointError(
            f"{fields.where}: num_key_value_heads is {num_kv_heads}; latent attention has one for each of the {num_heads} heads"
        )
    return num_heads, 1, latent.head_dim


def _read_mixture(directory: Path, fields: Fields, architecture: str, num_layers: int) -> MixtureConfig:
    stored = find_tensors(directory) if has_tensors(directory) else {}  # without them config.json can still be read
    return read_mixture(fields, architecture, num_layers, stored)


def _has_qkv_bias(fields: Fields, architecture: str) -> bool:
    """Whether q, k and v have a bias where the output has none."""
    if architecture == QWEN2_MOE:
        return fields.flag("qkv_bias", True)
    return architecture == QWEN2 or (architecture == GLM4_MOE and fields.flag("attention_bias"))


def _read_sliding_window(fields: Fields, architecture: str, num_layers: int) -> int | None:
    if architecture in (LLAMA, GLM4_MOE, *LATENTS) or (architecture in _WINDOW_FLAG and not fields.flag("use_sliding_window")):
        return None
    default = _DEFAULT_WINDOWS.get(architecture)
    if fields.values.get("sliding_window", default) is None:  # a null that is written means none, whatever the default
        return None
    kinds = fields.get("layer_types", _default_layer_types(fields, architecture, num_layers))
    if kinds == ["full_attention"] * num_layers:
        return None
    if kinds == ["sliding_attention"] * num_layers:
        return fields.whole("sliding_window", default)
    raise CheckpointError(f"{fields.where}: layer_types mix full and sliding attention ({shown(kinds)}); all layers must be of one kind")


def _default_layer_types(fields: Fields, architecture: str, num_layers: int) -> list[str]:
    """Return what each family's own configuration class assumes where layer_types is missing."""
    slides = [True] * num_layers  # Mistral, Mixtral, Qwen3-MoE: the window is for all layers
    if architecture in (QWEN2, QWEN3):
        first = fields.whole("max_window_layers", 28, low=0)
        slides = [layer >= first for layer in range(num_layers)]
    elif architecture == DOTS1:
        first = fields.whole("max_window_layers", 62, low=0)
        slides = [layer >= first for layer in range(num_layers)]
    elif architecture == QWEN2_MOE:
        end = fields.whole("max_window_layers", 28, low=0)
        slides = [layer % 2 == 0 and layer < end for layer in range(num_layers)]
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def check_tensor_parallel(config: ModelConfig, tp: int) -> None:
    """Check that ``tp`` ranks can share each layer; experts are placed whole, in any number.

    Raises:
        TopologyError: ``tp`` does not divide the heads or an MLP, or fits the KV heads neither way; names the sizes that work.
    """
    heads, kv_heads, widths = config.num_heads, config.num_kv_heads, _shared_widths(config)
    works = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and not any(width % n for width in widths.values()) and (kv_heads % n == 0 or n % kv_heads == 0)
    ]
    if tp not in works:
        sizes = [f"{heads} heads", f"{kv_heads} KV heads", *(f"{name} {width}" for name, width in widths.items())]
        raise TopologyError(
            f"tp {tp} does not fit {', '.join(sizes[:-1])} and {sizes[-1]}: it must divide all but the KV heads, and divide those or be "
            f"a multiple of them; choose one of {', '.join(map(str, works))}"
        )


def check_expert_parallel(config: ModelSizes, parallel: ParallelConfig) -> None:
    """Check that ``ep`` is 1 or tp, where each replica has all experts, or tp times the replicas that share them, which divide dp.

    Raises:
        TopologyError: another ``ep``, or one above 1 of a model without experts.
    """
    shares = [parallel.tp * count for count in range(1, parallel.dp + 1) if parallel.dp % count == 0]
    works = (1,) if config.mixture is None else (1, *shares)
    if parallel.ep not in works:
        what = "has no experts" if config.mixture is None else "spreads experts over the tp ranks of each replica, or of several"
        choices = " or ".join(map(str, dict.fromkeys(works)))
        raise TopologyError(f"ep is {parallel.ep}, and the model {what}: with tp {parallel.tp} and dp {parallel.dp} choose {choices}")


def shares_experts(config: ModelSizes, parallel: ParallelConfig) -> bool:
    """Return whether the experts are spread over several replicas, which then compute in lockstep."""
    return config.mixture is not None and parallel.ep > parallel.tp


def _shared_widths(config: ModelConfig) -> dict[str, int]:
    """Return the widths of the MLPs that the ranks share out, by what they are called."""
    widths, mixture = {}, config.mixture
    if mixture is None or len(mixture.layers) < config.num_layers:
        widths["intermediate_size"] = config.intermediate_size
    if mixture is not None and mixture.shared_size:
        widths["a shared expert of width"] = mixture.shared_size
    return widths


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the full shape of every tensor that the checkpoint must hold, by its Hugging Face name."""
    hidden, width = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    common = {**_attention_shapes(config), "input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    mlp = {
        **_linear_shapes("mlp.gate_proj", width, hidden, has_bias=config.mlp_bias),
        **_linear_shapes("mlp.up_proj", width, hidden, has_bias=config.mlp_bias),
        **_linear_shapes("mlp.down_proj", hidden, width, has_bias=config.mlp_bias),
    }
    for layer in range(config.num_layers):
        mixture = config.mixture_of(layer)
        parts = {**common, **(mlp if mixture is None else mixture_shapes(mixture, hidden))}
        shapes.update((f"model.layers.{layer}.{name}", shape) for name, shape in parts.items())
    return shapes


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer's attention, by their names within the layer."""
    hidden = config.hidden_size
    if config.latent is not None:
        return latent_shapes(config.latent, config.num_heads, hidden, has_bias=config.attention_bias)
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        **_linear_shapes("self_attn.q_proj", q_rows, hidden, has_bias=config.attention_bias),
        **_linear_shapes("self_attn.k_proj", kv_rows, hidden, has_bias=config.attention_bias),
        **_linear_shapes("self_attn.v_proj", kv_rows, hidden, has_bias=config.attention_bias),
        **_linear_shapes("self_attn.o_proj", hidden, q_rows, has_bias=config.output_bias),
        **({"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)} if config.qk_norm else {}),
    }


def _linear_shapes(name: str, rows: int, columns: int, *, has_bias: bool) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (rows, columns)}
    return {**weight, f"{name}.bias": (rows,)} if has_bias else weight


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
