"""config.json of mixtures of experts, from the hub and from Transformers 5, and the tensors that follow; no torch here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zspmd.errors import CheckpointError, TopologyError
from zspmd.mixture_config import MixtureConfig, place_experts
from zspmd.model_config import ModelConfig, check_checkpoint, check_tensor_parallel, read_model_config, tensor_shapes

BASE: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
MIXTRAL = {**BASE, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
QWEN2 = {
    **BASE,
    "architectures": ["Qwen2MoeForCausalLM"],
    "num_experts": 5,
    "moe_intermediate_size": 6,
    "shared_expert_intermediate_size": 10,
}
QWEN3 = {**BASE, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 5, "moe_intermediate_size": 6}
DOTS1 = {
    **BASE,
    "architectures": ["Dots1ForCausalLM"],
    "n_routed_experts": 6,
    "moe_intermediate_size": 5,
    "n_shared_experts": 2,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
GLM4 = {**DOTS1, "architectures": ["Glm4MoeForCausalLM"], "n_group": 1, "topk_group": 1, "head_dim": 8}


def save(directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a checkpoint of zeros."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))


def read(directory: Path, base: dict[str, Any], **changes: Any) -> ModelConfig:
    """Read a config with fields changed, or left out where the change is ``...``, beside a checkpoint without tensors."""
    if not (directory / "model.safetensors").exists():
        save(directory, {})
    values = {name: value for name, value in {**base, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return read_model_config(directory)


def read_mixture(directory: Path, base: dict[str, Any], **changes: Any) -> MixtureConfig:
    mixture = read(directory, base, **changes).mixture
    assert mixture is not None
    return mixture


def test_mixtral(tmp_path: Path) -> None:
    config = read(tmp_path, MIXTRAL)
    assert config.mixture == MixtureConfig(
        layers=(0, 1, 2),
        num_experts=4,
        top_k=2,
        expert_size=12,
        normalizes=True,
        block_name="block_sparse_moe",
        linear_names=("w1", "w3", "w2"),
    )
    assert (config.rope_theta, config.rms_norm_eps, config.sliding_window, config.qk_norm) == (1e6, 1e-5, None, False)
    assert (config.attention_bias, config.output_bias) == (False, False)


def test_qwen2_moe(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN2)
    assert config.mixture == MixtureConfig(
        layers=(0, 1, 2), num_experts=5, top_k=2, expert_size=6, shared_size=10, has_shared_gate=True, shared_name="shared_expert"
    )
    assert (config.attention_bias, config.output_bias, config.qk_norm, config.head_dim) == (True, False, False, 2)


def test_qwen3_moe(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN3, norm_topk_prob=True)
    assert config.mixture == MixtureConfig(layers=(0, 1, 2), num_experts=5, top_k=2, expert_size=6, normalizes=True)
    assert (config.attention_bias, config.output_bias, config.qk_norm, config.head_dim) == (False, False, True, 2)


def test_dots1(tmp_path: Path) -> None:
    config = read(tmp_path, DOTS1)
    assert config.mixture == MixtureConfig(
        layers=(1, 2),
        num_experts=6,
        top_k=2,
        expert_size=5,
        shared_size=10,
        scoring="sigmoid",
        has_correction_bias=True,
        scaling_factor=2.5,
        num_groups=3,
        num_top_groups=2,
        shared_name="shared_experts",
    )
    assert (config.qk_norm, config.sliding_window) == (True, None)


def test_glm4_moe(tmp_path: Path) -> None:
    config = read(tmp_path, GLM4, n_shared_experts=..., first_k_dense_replace=..., attention_bias=True, use_qk_norm=True)
    assert config.mixture == MixtureConfig(
        layers=(1, 2),
        num_experts=6,
        top_k=2,
        expert_size=5,
        shared_size=5,
        scoring="sigmoid",
        has_correction_bias=True,
        normalizes=True,
        scaling_factor=2.5,
        shared_name="shared_experts",
    )
    assert (config.attention_bias, config.output_bias, config.qk_norm, config.head_dim) == (True, False, True, 8)
    assert (config.rotary_dim, config.rms_norm_eps, config.rope_theta) == (4, 1e-5, 1e4)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        pytest.param({"partial_rotary_factor": 0.25}, 2, id="old"),
        pytest.param({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 1.0}}, 8, id="new"),
    ],
)
def test_a_part_of_each_head_is_rotated(tmp_path: Path, changes: dict[str, Any], wanted: int) -> None:
    assert read(tmp_path, GLM4, **changes).rotary_dim == wanted


@pytest.mark.parametrize(
    ("base", "changes", "wanted"),
    [
        pytest.param(QWEN3, {"num_experts": ..., "num_local_experts": 7}, {"num_experts": 7}, id="count-as-transformers-5-writes-it"),
        pytest.param(QWEN3, {"mlp_only_layers": [1]}, {"layers": (0, 2)}, id="one-dense-layer"),
        pytest.param(QWEN3, {"mlp_only_layers": None}, {"layers": (0, 1, 2)}, id="null-dense-layers"),
        pytest.param(QWEN2, {"decoder_sparse_step": 2}, {"layers": (1,)}, id="every-second-layer"),
        pytest.param(QWEN2, {"decoder_sparse_step": 2, "mlp_only_layers": [1]}, {"layers": ()}, id="no-mixture-at-all"),
        pytest.param(DOTS1, {"first_k_dense_replace": ...}, {"layers": (0, 1, 2)}, id="no-dense-layer-first"),
        pytest.param(DOTS1, {"n_group": ..., "topk_group": ...}, {"num_groups": 1, "num_top_groups": 1}, id="one-group"),
        pytest.param(DOTS1, {"norm_topk_prob": True}, {"normalizes": True}, id="normalized"),
    ],
)
def test_variants(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    mixture = read_mixture(tmp_path, base, **changes)
    assert {name: getattr(mixture, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("base", "changes", "wanted"),
    [
        pytest.param(MIXTRAL, {"sliding_window": 16}, 16, id="mixtral-window"),
        pytest.param(QWEN2, {"sliding_window": 16}, None, id="qwen2-off"),
        pytest.param(QWEN2, {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, None, id="qwen2-no-layer"),
        pytest.param(QWEN3, {"sliding_window": 16}, None, id="qwen3-off"),
        pytest.param(QWEN3, {"sliding_window": 16, "use_sliding_window": True}, 16, id="qwen3-all-layers"),
        pytest.param(DOTS1, {"sliding_window": 16, "max_window_layers": 0}, 16, id="dots1-all-layers"),
        pytest.param(DOTS1, {"sliding_window": None, "max_window_layers": 0}, None, id="dots1-null"),
    ],
)
def test_sliding_windows(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], wanted: int | None) -> None:
    assert read(tmp_path, base, **changes).sliding_window == wanted


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        pytest.param(MIXTRAL, {"num_local_experts": ...}, "has no num_local_experts", id="no-count"),
        pytest.param(QWEN2, {"num_experts": 0}, "num_experts is 0; it must be a whole number from 1", id="no-experts"),
        pytest.param(QWEN3, {"num_experts_per_tok": 6}, "num_experts_per_tok is 6; it must be a whole number from 1 to 5", id="top-k"),
        pytest.param(QWEN3, {"moe_intermediate_size": ...}, "has no moe_intermediate_size", id="no-width"),
        pytest.param(QWEN2, {"shared_expert_intermediate_size": ...}, "has no shared_expert_intermediate_size", id="no-shared-width"),
        pytest.param(QWEN3, {"mlp_only_layers": [-1]}, r"mlp_only_layers is \[-1\]; it must be a list", id="dense-layers"),
        pytest.param(QWEN3, {"mlp_only_layers": 1}, "mlp_only_layers is 1; it must be a list", id="dense-layers-no-list"),
        pytest.param(QWEN3, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0", id="step"),
        pytest.param(QWEN3, {"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be true or false", id="flag"),
        pytest.param(QWEN3, {"num_experts": 100, "num_hidden_layers": 9_999}, "is 100 in 9999 layers; .* not have more than", id="many"),
        pytest.param(DOTS1, {"n_group": 4}, "n_group is 4 for 6 experts; groups must be equal", id="uneven-groups"),
        pytest.param(DOTS1, {"n_group": 6}, "n_group is 6 for 6 experts; .* of two at least", id="groups-of-one"),
        pytest.param(DOTS1, {"topk_group": 4}, "topk_group is 4; it must be a whole number from 1 to 3", id="top-groups"),
        pytest.param(
            DOTS1, {"topk_group": 1, "num_experts_per_tok": 3}, "num_experts_per_tok is 3, but topk_group 1 leaves 2", id="too-few-left"
        ),
        pytest.param(
            QWEN2, {"sliding_window": 8, "use_sliding_window": True}, "layer_types mix full and sliding", id="alternating-windows"
        ),
        pytest.param(GLM4, {"partial_rotary_factor": 0.4}, "is 0.4; an even number of a head's 8 dims must be", id="odd-rotation"),
        pytest.param(GLM4, {"partial_rotary_factor": 1e308}, "is 1e\\+308; an even number of a head's 8 dims must be", id="large-rotation"),
        pytest.param(DOTS1, {"partial_rotary_factor": 0.5}, "is 0.5; only 1 is supported", id="partial-rotation"),
        pytest.param(DOTS1, {"max_window_layers": 1}, "layer_types mix full and sliding", id="window-in-later-layers"),
    ],
)
def test_bad_config_is_refused(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, base, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize("base", [MIXTRAL, QWEN2, QWEN3, DOTS1, GLM4], ids=["mixtral", "qwen2", "qwen3", "dots1", "glm4"])
@pytest.mark.parametrize("is_stacked", [False, True], ids=["apart", "stacked"])
def test_whole_checkpoint_passes_and_a_missing_expert_is_named(tmp_path: Path, base: dict[str, Any], is_stacked: bool) -> None:
    """How the experts are stored shows in the names of the tensors; config.json says nothing of it."""
    config = read(tmp_path, base)
    assert config.mixture is not None
    assert not config.mixture.is_stacked
    if is_stacked:
        config = replace(config, mixture=replace(config.mixture, is_stacked=True, block_name="mlp"))
    shapes = tensor_shapes(config)
    save(tmp_path, shapes)
    assert read_model_config(tmp_path) == config
    check_checkpoint(tmp_path, config)
    missing = next(name for name in reversed(shapes) if ".experts." in name)
    del shapes[missing]
    save(tmp_path, shapes)
    with pytest.raises(CheckpointError, match=f"has no tensor {missing}"):
        check_checkpoint(tmp_path, config)


def test_shapes_of_a_mixture_and_a_dense_layer(tmp_path: Path) -> None:
    shapes = tensor_shapes(read(tmp_path, QWEN2, mlp_only_layers=[0], num_experts=2))
    layers = [{name.split(".", 3)[3]: shape for name, shape in shapes.items() if f"layers.{i}.mlp" in name} for i in (0, 1)]
    assert layers[0] == {"mlp.gate_proj.weight": (12, 8), "mlp.up_proj.weight": (12, 8), "mlp.down_proj.weight": (8, 12)}
    assert layers[1] == {
        "mlp.gate.weight": (2, 8),
        **{f"mlp.experts.{i}.{name}.weight": (6, 8) for i in (0, 1) for name in ("gate_proj", "up_proj")},
        **{f"mlp.experts.{i}.down_proj.weight": (8, 6) for i in (0, 1)},
        "mlp.shared_expert.gate_proj.weight": (10, 8),
        "mlp.shared_expert.up_proj.weight": (10, 8),
        "mlp.shared_expert.down_proj.weight": (8, 10),
        "mlp.shared_expert_gate.weight": (1, 8),
    }


@pytest.mark.parametrize(
    ("base", "changes", "works", "sizes"),
    [
        pytest.param(MIXTRAL, {"intermediate_size": 7}, [1, 2, 4], "4 heads and 2 KV heads", id="experts-need-not-divide"),
        pytest.param(QWEN3, {"intermediate_size": 7}, [1, 2, 4], "4 heads and 2 KV heads", id="no-dense-layer"),
        pytest.param(
            QWEN3, {"intermediate_size": 6, "mlp_only_layers": [0]}, [1, 2], "2 KV heads and intermediate_size 6", id="dense-layer"
        ),
        pytest.param(QWEN2, {}, [1, 2], "2 KV heads and a shared expert of width 10", id="shared-expert"),
    ],
)
def test_tensor_parallel_sizes(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], works: list[int], sizes: str) -> None:
    config = read(tmp_path, base, **changes)
    for tp in range(6):
        if tp in works:
            check_tensor_parallel(config, tp)
        else:
            with pytest.raises(TopologyError, match=f"tp {tp} does not fit .*{sizes}: .* choose one of {', '.join(map(str, works))}"):
                check_tensor_parallel(config, tp)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_experts_are_placed_once_and_evenly(size: int) -> None:
    placed = [place_experts(7, rank, size) for rank in range(size)]
    assert [expert for span in placed for expert in span] == list(range(7))
    assert max(map(len, placed)) - min(map(len, placed)) <= 1
