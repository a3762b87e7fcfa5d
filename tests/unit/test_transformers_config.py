"""config.json of a model that runs through Transformers, as far as the driver can read it; no torch here."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from zspmd.config import EngineConfig, ParallelConfig
from zspmd.errors import CheckpointError, ConfigError, TopologyError
from zspmd.model_config import ModelConfig
from zspmd.runtime.engine.checkpoint import open_checkpoint
from zspmd.runtime.engine.rank_shares import share_model
from zspmd.transformers_config import TransformersConfig, check_any_checkpoint, read_any_config

GRANITE: dict[str, Any] = {
    "architectures": ["GraniteForCausalLM"],
    "model_type": "granite",
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "original_max_position_embeddings": 32}


def write(directory: Path, *, stored: str = "F32", **changes: Any) -> None:
    """Write GRANITE with fields changed, or left out where the change is ``...``, and one tensor."""
    values = {name: value for name, value in {**GRANITE, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    header = json.dumps({"w": {"dtype": stored, "shape": [8], "data_offsets": [0, 8 * (4 if stored == "F32" else 1)]}}).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8 * (4 if stored == "F32" else 1)))


def read(directory: Path, **changes: Any) -> TransformersConfig:
    write(directory, **changes)
    config = read_any_config(directory)
    assert isinstance(config, TransformersConfig)
    return config


def test_the_driver_reads_sizes_alone(tmp_path: Path) -> None:
    assert read(tmp_path, eos_token_id=[3, 4], torch_dtype="bfloat16") == TransformersConfig(
        architecture="GraniteForCausalLM",
        model_type="granite",
        vocab_size=11,
        hidden_size=8,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=2,
        max_position_embeddings=64,
        dtype="bfloat16",
        eos_token_ids=(3, 4),
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        pytest.param({"num_key_value_heads": ...}, {"num_kv_heads": 4}, id="as-many-kv-heads-as-heads"),
        pytest.param({"head_dim": 6}, {"head_dim": 6}, id="head-dim"),
        pytest.param({"attn_logit_softcapping": None, "num_experts": 0, "is_encoder_decoder": False}, {}, id="features-that-are-off"),
        pytest.param({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}, {}, id="layer-types"),
        pytest.param({"rope_scaling": LONGROPE}, {"max_steady_positions": 32}, id="longrope"),
        pytest.param({"rope_parameters": {"a": LONGROPE, "b": {"rope_type": "default"}}}, {"max_steady_positions": 32}, id="by-layer-type"),
        pytest.param(
            {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 16},
            {"max_steady_positions": 16},
            id="as-phi3-writes",
        ),
        pytest.param({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {"max_steady_positions": None}, id="dynamic-rope"),
    ],
)
def test_variants(tmp_path: Path, changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    config = read(tmp_path, **changes)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"architectures": ["MambaForCausalLM"]}, r"\['MambaForCausalLM'\]; supported are Llama", id="state-space"),
        pytest.param({"architectures": ["T5ForConditionalGeneration"]}, r"architectures is .*; supported are Llama", id="no-causal-lm"),
        pytest.param({"architectures": []}, r"architectures is \[\]; supported are", id="none"),
        pytest.param({"is_encoder_decoder": True}, r"GraniteForCausalLM is an encoder and a decoder \(is_encoder_decoder\)", id="encoder"),
        pytest.param({"add_cross_attention": True}, r"attends to another input \(add_cross_attention\)", id="cross-attention"),
        pytest.param({"alibi": True}, r"has ALiBi positions \(alibi\)", id="alibi"),
        pytest.param({"attn_logit_softcapping": 50.0}, r"caps attention scores \(attn_logit_softcapping\), which is not", id="softcap"),
        pytest.param({"num_local_experts": 4}, r"has a mixture of experts \(num_local_experts\)", id="experts"),
        pytest.param({"layer_types": ["mamba", "full_attention"]}, r"has layers of type 'mamba' \(layer_types\)", id="layers"),
        pytest.param({"quantization_config": {}}, r"has a quantization_config", id="quantized"),
        pytest.param({"num_key_value_heads": 3}, r"num_key_value_heads 3 does not divide num_attention_heads 4", id="kv-heads"),
        pytest.param({"vocab_size": ...}, r"has no vocab_size; the model cannot be built without it", id="vocabulary"),
        pytest.param({"max_position_embeddings": ...}, r"has no max_position_embeddings", id="positions"),
        pytest.param({"model_type": ...}, r"has no model_type", id="type"),
        pytest.param({"model_type": 3}, r"model_type is 3; it must be Transformers' name of the family", id="type-of-type"),
        pytest.param({"dtype": "int8"}, r"dtype is 'int8'; supported are float32", id="dtype"),
        pytest.param({"rope_scaling": {"type": "longrope"}}, r"has no original_max_position_embeddings", id="longrope"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_any_config(tmp_path)


def test_models_of_ours_stay_ours(tmp_path: Path) -> None:
    write(tmp_path, architectures=["LlamaForCausalLM"], intermediate_size=12)
    assert isinstance(read_any_config(tmp_path), ModelConfig)
    with pytest.raises(CheckpointError, match="no model directory"):
        read_any_config(tmp_path / "nowhere")


def test_one_warning_says_what_computes_the_model(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.warns(UserWarning, match="GraniteForCausalLM runs through Transformers' modelling code, which is slower") as warned:
        checkpoint = open_checkpoint(tmp_path, ParallelConfig(tp=2, pp=3), EngineConfig())
    assert len(warned) == 1
    assert checkpoint.preload == ("zspmd.models.transformers_model",)
    assert open_checkpoint("demo", ParallelConfig(), EngineConfig()).preload == ()


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        pytest.param(ParallelConfig(tp=4), r"tp 4 must divide 4 heads and 2 KV heads of GraniteForCausalLM.*choose one of 1, 2$", id="tp"),
        pytest.param(ParallelConfig(pp=4), r"pp 4 is more than the 3 layers", id="pp"),
        pytest.param(ParallelConfig(tp=2, ep=2), r"ep is 2, and the model has no experts", id="ep"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(tmp_path: Path, parallel: ParallelConfig, message: str) -> None:
    write(tmp_path)
    with pytest.raises(TopologyError, match=message):
        open_checkpoint(tmp_path, parallel, EngineConfig())


def test_contexts_are_no_longer_than_all_requests_compute_alike(tmp_path: Path) -> None:
    write(tmp_path, rope_scaling=LONGROPE)
    with pytest.raises(ConfigError, match=r"max_model_len is 64, and beyond 32 positions .* set max_model_len to 32 at most"):
        open_checkpoint(tmp_path, ParallelConfig(), EngineConfig())
    with pytest.warns(UserWarning, match="GraniteForCausalLM"):
        assert open_checkpoint(tmp_path, ParallelConfig(), EngineConfig(max_model_len=32)).max_model_len == 32


def test_files_must_be_whole_and_have_weights(tmp_path: Path) -> None:
    config = read(tmp_path)
    check_any_checkpoint(tmp_path, config)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        check_any_checkpoint(tmp_path, config)


def test_weights_of_whole_numbers_alone_are_refused(tmp_path: Path) -> None:
    config = read(tmp_path)
    write(tmp_path, stored="I8")
    with pytest.raises(CheckpointError, match=r"has no tensor in F32, F16, BF16; convert the checkpoint"):
        check_any_checkpoint(tmp_path, config)


def test_dry_run_says_what_is_known(tmp_path: Path) -> None:
    """Each rank has the whole embedding, its own rows of the head, and weights that nobody has counted."""
    shares = share_model(read(tmp_path), ParallelConfig(tp=2, pp=2), None, ["float32"] * 4)
    rows = [(s.layers, s.heads, s.kv_heads, s.vocabulary_rows, s.weights_bytes) for s in shares]
    assert rows == [
        (range(2), range(2), range(1), range(11), None),
        (range(2), range(2, 4), range(1, 2), range(11), None),
        (range(2, 3), range(2), range(1), range(6), None),
        (range(2, 3), range(2, 4), range(1, 2), range(6, 11), None),
    ]
