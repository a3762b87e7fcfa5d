"""config.json of each family, old and new, and what follows from it; no torch here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zspmd.errors import CheckpointError, TopologyError
from zspmd.model_config import ModelConfig, check_checkpoint, check_tensor_parallel, read_model_config, tensor_shapes
from zspmd.rope_config import RopeScaling

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3_SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


def read(directory: Path, **changes: Any) -> ModelConfig:
    """Read LLAMA with fields changed, or left out where the change is ``...``."""
    values = {name: value for name, value in {**LLAMA, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return read_model_config(directory)


def test_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    assert read(tmp_path) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        rotary_dim=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        rope_scaling=None,
        sliding_window=None,
        attention_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        dtype="float32",
        eos_token_ids=(),
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        pytest.param({"num_key_value_heads": ...}, {"num_kv_heads": 4}, id="llama-1-without-kv-heads"),
        pytest.param({"attention_bias": True}, {"attention_bias": True, "output_bias": True}, id="llama-attention-bias"),
        pytest.param({"mlp_bias": True}, {"mlp_bias": True}, id="llama-mlp-bias"),
        pytest.param({"head_dim": 6}, {"head_dim": 6}, id="head-dim"),
        pytest.param({"head_dim": None}, {"head_dim": 2}, id="head-dim-null"),
        pytest.param({"sliding_window": 16}, {"sliding_window": None}, id="llama-has-no-window"),
        pytest.param({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, id="torch-dtype"),
        pytest.param({"dtype": "float16", "torch_dtype": "bfloat16"}, {"dtype": "float16"}, id="dtype-before-torch-dtype"),
        pytest.param({"eos_token_id": 2}, {"eos_token_ids": (2,)}, id="one-eos"),
        pytest.param({"eos_token_id": [5, 2]}, {"eos_token_ids": (5, 2)}, id="several-eos"),
        pytest.param({"rope_theta": 5e5}, {"rope_theta": 5e5}, id="old-theta"),
        pytest.param({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}, id="new-theta"),
        pytest.param({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": RopeScaling("linear", 2.0)}, id="old-linear"),
        pytest.param({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, {"rope_scaling": LLAMA3_SCALING}, id="old-llama3"),
        pytest.param(
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            {"rope_scaling": LLAMA3_SCALING, "rope_theta": 5e5},
            id="new-llama3",
        ),
        pytest.param(
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=64, table_factor=0.1 * math.log(4) + 1)},
            id="yarn",
        ),
        pytest.param({"architectures": ["MistralForCausalLM"]}, {"sliding_window": 4096}, id="mistral-default-window"),
        pytest.param({"architectures": ["MistralForCausalLM"], "sliding_window": None}, {"sliding_window": None}, id="mistral-no-window"),
        pytest.param({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, {"sliding_window": 8}, id="mistral-window"),
        pytest.param({"architectures": ["Qwen2ForCausalLM"]}, {"attention_bias": True, "output_bias": False}, id="qwen2-biases"),
        pytest.param({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8}, {"sliding_window": None}, id="qwen2-window-off"),
        pytest.param(
            {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
            {"sliding_window": 8},
            id="qwen2-window-on",
        ),
        pytest.param(
            {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
            {"sliding_window": None},
            id="qwen2-window-above-all-layers",
        ),
        pytest.param({"architectures": ["Qwen3ForCausalLM"]}, {"qk_norm": True, "head_dim": 128}, id="qwen3"),
    ],
)
def test_variants(tmp_path: Path, changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    config = read(tmp_path, **changes)
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_eos_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert read(tmp_path, eos_token_id=2).eos_token_ids == (7, 2)
    assert read(tmp_path, eos_token_id=3).eos_token_ids == (7, 2, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"architectures": ["GPT2LMHeadModel"]}, r"\['GPT2LMHeadModel'\]; supported are LlamaForCausalLM, Mi", id="architecture"
        ),
        pytest.param({"architectures": ...}, "has no architectures", id="no-architecture"),
        pytest.param({"hidden_size": ...}, "has no hidden_size", id="missing-field"),
        pytest.param({"vocab_size": "11"}, "vocab_size is '11'; it must be a whole number", id="text-for-number"),
        pytest.param({"num_hidden_layers": 0}, "num_hidden_layers is 0", id="no-layers"),
        pytest.param({"num_hidden_layers": True}, "num_hidden_layers is True", id="boolean-for-number"),
        pytest.param({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 4", id="kv-heads"),
        pytest.param({"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": ...}, "has no num_key_value_heads", id="no-kv-heads"),
        pytest.param({"head_dim": 3}, "head_dim is 3", id="odd-head-dim"),
        pytest.param({"rms_norm_eps": 0}, "rms_norm_eps is 0", id="no-eps"),
        pytest.param({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf", id="infinite-eps"),
        pytest.param({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false", id="flag"),
        pytest.param({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'", id="activation"),
        pytest.param({"quantization_config": {}}, "has a quantization_config", id="quantized"),
        pytest.param({"dtype": "float64"}, "dtype is 'float64'; supported are float32", id="dtype"),
        pytest.param({"rope_scaling": {"type": "dynamic"}}, "rope_type is 'dynamic'; supported are default, linear", id="rope-kind"),
        pytest.param({"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor", id="no-factor"),
        pytest.param({"rope_scaling": [1]}, r"rope_scaling is \[1\]; it must be an object", id="rope-list"),
        pytest.param({"rope_scaling": {**LLAMA3, "type": "llama3", "low_freq_factor": 4.0}}, "4.0 must be below", id="rope-factors"),
        pytest.param({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5", id="partial-rotary"),
        pytest.param({"eos_token_id": "</s>"}, "eos_token_id is '</s>'", id="eos"),
        pytest.param(
            {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
            "layer_types mix full and sliding",
            id="mixed-windows",
        ),
    ],
)
def test_bad_config_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_missing_directory_and_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model directory .*nowhere; give a local directory"):
        read_model_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"cannot read .*config.json: No such file"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'], ids=["half", "list", "text"])
def test_config_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config.json is"):
        read_model_config(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    return read(tmp_path)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "works"),
    [
        pytest.param(4, 2, 12, [1, 2, 4], id="kv-replicated-at-4"),
        pytest.param(12, 4, 24, [1, 2, 4, 12], id="3-and-6-fit-no-kv-heads"),
        pytest.param(8, 8, 12, [1, 2, 4], id="width-ends-it"),
        pytest.param(14, 2, 28, [1, 2, 14], id="qwen2-0.5b-heads"),
    ],
)
def test_tensor_parallel_sizes(config: ModelConfig, heads: int, kv_heads: int, width: int, works: list[int]) -> None:
    sized = replace(config, num_heads=heads, num_kv_heads=kv_heads, intermediate_size=width)
    for tp in range(heads + 2):
        if tp in works:
            check_tensor_parallel(sized, tp)
        else:
            with pytest.raises(TopologyError, match=f"tp {tp} does not fit {heads} heads, .* choose one of {', '.join(map(str, works))}"):
                check_tensor_parallel(sized, tp)


def save(directory: Path, shapes: dict[str, tuple[int, ...]], *, dtype: str = "F32", item_bytes: int = 4) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = item_bytes
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))


@pytest.mark.parametrize(("dtype", "item_bytes"), [("F32", 4), ("F16", 2), ("BF16", 2)], ids=["F32", "F16", "BF16"])
def test_whole_checkpoint_passes(tmp_path: Path, config: ModelConfig, dtype: str, item_bytes: int) -> None:
    save(tmp_path, {**tensor_shapes(config), "rotary.inv_freq": (3,)}, dtype=dtype, item_bytes=item_bytes)
    check_checkpoint(tmp_path, config)


def test_missing_tensor_is_named(tmp_path: Path, config: ModelConfig) -> None:
    shapes = tensor_shapes(config)
    del shapes["lm_head.weight"]
    save(tmp_path, shapes)
    check_checkpoint(tmp_path, replace(config, tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match=r"has no tensor lm_head.weight") as caught:
        check_checkpoint(tmp_path, config)
    assert caught.value.tensor == "lm_head.weight"


def test_tensor_that_only_the_index_names_is_missing(tmp_path: Path, config: ModelConfig) -> None:
    shapes = tensor_shapes(config)
    index = {"weight_map": dict.fromkeys(shapes, "part.safetensors")}
    del shapes["model.norm.weight"]
    save(tmp_path, shapes)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"part.safetensors has no tensor model.norm.weight"):
        check_checkpoint(tmp_path, config)


def test_wrong_shape_is_named(tmp_path: Path, config: ModelConfig) -> None:
    save(tmp_path, tensor_shapes(replace(config, vocab_size=13)))
    with pytest.raises(CheckpointError, match=r"has shape \[13, 8\] where config.json asks for \[11, 8\]") as caught:
        check_checkpoint(tmp_path, config)
    assert (caught.value.tensor, caught.value.wanted, caught.value.found) == ("model.embed_tokens.weight", (11, 8), (13, 8))


def test_unsupported_dtype_is_named(tmp_path: Path, config: ModelConfig) -> None:
    save(tmp_path, tensor_shapes(config), dtype="I8", item_bytes=1)
    with pytest.raises(CheckpointError, match="is stored as I8; supported are F32, F16, BF16"):
        check_checkpoint(tmp_path, config)
