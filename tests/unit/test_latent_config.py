"""config.json of DeepSeek's families as they lie on the hub, and the tensors that follow; no torch here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.deepseek_configs import DEEPSEEK_V2, DEEPSEEK_V2_LITE, DEEPSEEK_V3

from zspmd.errors import CheckpointError, TopologyError
from zspmd.latent_config import LatentConfig
from zspmd.mixture_config import MixtureConfig
from zspmd.model_config import ModelConfig, check_tensor_parallel, read_model_config, tensor_shapes
from zspmd.rope_config import RopeScaling


def read(directory: Path, base: dict[str, Any], **changes: Any) -> ModelConfig:
    """Read a config with fields changed, or left out where the change is ``...``; no weights lie beside it."""
    values = {name: value for name, value in {**base, **changes}.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(values))
    return read_model_config(directory)


def test_deepseek_v3(tmp_path: Path) -> None:
    config = read(tmp_path, DEEPSEEK_V3)
    assert config.latent == LatentConfig(query_rank=1536, rank=512, nope_dim=128, rope_dim=64, value_dim=128, rotates_pairs=True)
    assert config.rope_scaling == RopeScaling(
        "yarn", 40.0, original_max_position_embeddings=4096, table_factor=1.0, all_dims_factor=0.1 * math.log(40) + 1
    )
    assert config.mixture == MixtureConfig(
        layers=tuple(range(3, 61)),
        num_experts=256,
        top_k=8,
        expert_size=2048,
        shared_size=2048,
        scoring="sigmoid",
        has_correction_bias=True,
        normalizes=True,
        scaling_factor=2.5,
        num_groups=8,
        num_top_groups=4,
        shared_name="shared_experts",
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.rotary_dim) == (128, 1, 192, 64)
    assert (config.attention_bias, config.output_bias, config.qk_norm, config.sliding_window) == (False, False, False, None)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.dtype, config.eos_token_ids) == (163840, 1e-6, "bfloat16", (1,))


def test_deepseek_v2(tmp_path: Path) -> None:
    config = read(tmp_path, DEEPSEEK_V2)
    assert config.latent == LatentConfig(query_rank=1536, rank=512, nope_dim=128, rope_dim=64, value_dim=128, rotates_pairs=True)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.table_factor, config.rope_scaling.all_dims_factor) == (1.0, 0.0707 * math.log(40) + 1)
    assert config.mixture == MixtureConfig(
        layers=tuple(range(1, 60)),
        num_experts=160,
        top_k=6,
        expert_size=1536,
        shared_size=3072,
        scaling_factor=16.0,
        num_groups=8,
        num_top_groups=3,
        shared_name="shared_experts",
    )


def test_deepseek_v2_lite(tmp_path: Path) -> None:
    config = read(tmp_path, DEEPSEEK_V2_LITE)
    assert config.latent is not None
    assert config.mixture is not None
    assert config.latent.query_rank is None
    assert (config.mixture.num_groups, config.mixture.num_experts, config.mixture.scoring) == (1, 64, "softmax")


@pytest.mark.parametrize(
    ("base", "num_parameters"),
    [
        pytest.param(DEEPSEEK_V2_LITE, 15_706_484_224, id="v2-lite"),
        pytest.param(DEEPSEEK_V2, 235_741_434_880, id="v2"),
        pytest.param(DEEPSEEK_V3, 671_026_419_200, id="v3"),
    ],
)
def test_parameters_are_as_many_as_published(tmp_path: Path, base: dict[str, Any], num_parameters: int) -> None:
    """Without V3's layer for the token after the next, which is not loaded."""
    shapes = tensor_shapes(read(tmp_path, base))
    assert sum(map(math.prod, shapes.values())) == num_parameters


def test_shapes_of_a_layer(tmp_path: Path) -> None:
    config = read(tmp_path, DEEPSEEK_V3, attention_bias=True)
    shapes = {name[15:]: shape for name, shape in tensor_shapes(config).items() if name.startswith("model.layers.0.")}
    assert {name: shape for name, shape in shapes.items() if name.startswith("self_attn.")} == {
        "self_attn.q_a_proj.weight": (1536, 7168),
        "self_attn.q_a_proj.bias": (1536,),
        "self_attn.q_a_layernorm.weight": (1536,),
        "self_attn.q_b_proj.weight": (24576, 1536),
        "self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
        "self_attn.kv_a_proj_with_mqa.bias": (576,),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (32768, 512),
        "self_attn.o_proj.weight": (7168, 16384),
        "self_attn.o_proj.bias": (7168,),
    }
    assert {name for name in shapes if not name.startswith("self_attn.")} == {
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }


YARN = DEEPSEEK_V3["rope_scaling"]


@pytest.mark.parametrize(
    ("base", "changes", "wanted"),
    [
        pytest.param(DEEPSEEK_V3, {"num_key_value_heads": ...}, {"num_kv_heads": 1}, id="no-kv-heads"),
        pytest.param(DEEPSEEK_V3, {"head_dim": 64}, {"head_dim": 192, "rotary_dim": 64}, id="head-dim-as-transformers-5-writes-it"),
        pytest.param(DEEPSEEK_V3, {"attention_bias": True}, {"attention_bias": True, "output_bias": True}, id="biases"),
        pytest.param(DEEPSEEK_V3, {"rope_scaling": None}, {"rope_scaling": None}, id="no-scaling"),
    ],
)
def test_variants(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    config = read(tmp_path, base, **changes)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        pytest.param({"mscale": 0.5}, {"table_factor": (0.05 * math.log(40) + 1) / (0.1 * math.log(40) + 1)}, id="mscales-differ"),
        pytest.param({"mscale_all_dim": 0}, {"table_factor": 0.1 * math.log(40) + 1, "all_dims_factor": 1.0}, id="no-mscale-all-dim"),
        pytest.param({"attention_factor": 1.25}, {"table_factor": 1.25}, id="factor-written"),
        pytest.param({"factor": 0.5}, {"table_factor": 1.0, "all_dims_factor": 1.0}, id="factor-below-1"),
        pytest.param({"beta_fast": 16, "beta_slow": 2, "truncate": False}, {"beta_fast": 16.0, "truncates": False}, id="bounds"),
        pytest.param({"original_max_position_embeddings": None}, {"original_max_position_embeddings": 163840}, id="original-context"),
    ],
)
def test_yarn(tmp_path: Path, changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    scaling = read(tmp_path, DEEPSEEK_V3, rope_scaling={**YARN, **changes}).rope_scaling
    assert {name: getattr(scaling, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("base", "changes", "wanted"),
    [
        pytest.param(DEEPSEEK_V3, {"rope_interleave": False}, False, id="v3-halves"),
        pytest.param(DEEPSEEK_V2, {"rope_interleave": False}, True, id="v2-knows-no-other"),
    ],
)
def test_what_is_rotated_against_what(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], wanted: bool) -> None:
    latent = read(tmp_path, base, **changes).latent
    assert latent is not None
    assert latent.rotates_pairs == wanted


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        pytest.param(DEEPSEEK_V3, {"kv_lora_rank": ...}, "has no kv_lora_rank", id="no-rank"),
        pytest.param(DEEPSEEK_V3, {"q_lora_rank": 0}, "q_lora_rank is 0; it must be a whole number from 1", id="query-rank"),
        pytest.param(DEEPSEEK_V3, {"qk_nope_head_dim": 0}, "qk_nope_head_dim is 0", id="nope-dim"),
        pytest.param(DEEPSEEK_V3, {"v_head_dim": "128"}, "v_head_dim is '128'", id="value-dim"),
        pytest.param(DEEPSEEK_V3, {"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; rotary embedding needs an even one", id="odd"),
        pytest.param(DEEPSEEK_V3, {"rope_interleave": 1}, "rope_interleave is 1; it must be true or false", id="interleave"),
        pytest.param(DEEPSEEK_V3, {"num_key_value_heads": 64}, "is 64; latent attention has one for each of the 128", id="kv-heads"),
        pytest.param(DEEPSEEK_V2_LITE, {"attention_bias": True}, "is true and q_lora_rank null; biases are supported with", id="bias"),
        pytest.param(DEEPSEEK_V2, {"mlp_bias": True}, "mlp_bias is true; experts with biases are not supported", id="mlp-bias"),
        pytest.param(DEEPSEEK_V3, {"partial_rotary_factor": 0.5}, "is 0.5; only 1 is supported", id="partial-rotation"),
        pytest.param(DEEPSEEK_V3, {"quantization_config": {"fmt": "e4m3"}}, "has a quantization_config", id="fp8-as-on-the-hub"),
        pytest.param(DEEPSEEK_V3, {"rope_scaling": {**YARN, "factor": None}}, "rope_scaling has no factor", id="no-factor"),
        pytest.param(DEEPSEEK_V3, {"rope_scaling": {**YARN, "mscale": -1}}, "mscale is -1", id="mscale"),
        pytest.param(DEEPSEEK_V3, {"rope_theta": 1}, "rope_theta is 1.0; yarn needs one above 1", id="theta"),
        pytest.param(DEEPSEEK_V3, {"rope_scaling": {**YARN, "type": "longrope"}}, "rope_type is 'longrope'; supported are", id="kind"),
        pytest.param(DEEPSEEK_V2, {"topk_method": "noaux_tc"}, "is 'noaux_tc'; DeepseekV2ForCausalLM has greedy and gr", id="v2-method"),
        pytest.param(DEEPSEEK_V3, {"topk_method": "greedy"}, "is 'greedy'; DeepseekV3ForCausalLM has noaux_tc", id="v3-method"),
        pytest.param(DEEPSEEK_V3, {"scoring_func": "softmax"}, "is 'softmax'; DeepseekV3ForCausalLM has sigmoid", id="v3-scores"),
        pytest.param(DEEPSEEK_V2, {"scoring_func": "sigmoid"}, "is 'sigmoid'; DeepseekV2ForCausalLM has softmax", id="v2-scores"),
        pytest.param(DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob is true; DeepSeek's own code then leaves out", id="v2-norm"),
        pytest.param(DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq is 2; only 1 is supported", id="every-other-layer"),
        pytest.param(DEEPSEEK_V2, {"n_group": 7}, "n_group is 7 for 160 experts; groups must be equal", id="groups"),
    ],
)
def test_bad_config_is_refused(tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path, base, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_tensor_parallel_sizes_divide_heads_and_shared_experts(tmp_path: Path) -> None:
    """Every rank has the latent, so that it limits nothing."""
    config = read(tmp_path, DEEPSEEK_V3)
    for tp in (1, 2, 8, 64, 128):
        check_tensor_parallel(config, tp)
    with pytest.raises(TopologyError, match=r"tp 3 does not fit 128 heads, .* choose one of 1, 2, 4, 8, 16, 32, 64, 128"):
        check_tensor_parallel(config, 3)
