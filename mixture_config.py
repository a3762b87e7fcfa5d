"""What config.json says of a mixture of experts, the tensors that follow, and which rank has which expert. Standard library only.

In a mixture layer a router gives each token ``top_k`` of the experts, each an MLP of its own; a shared expert, where there is one,
takes every token. The families differ in fields:

    MixtralForCausalLM    softmax; chosen weights sum to 1
    Qwen2MoeForCausalLM   softmax; a shared expert behind a gate; some layers may be dense
    Qwen3MoeForCausalLM   softmax; some layers may be dense
    Dots1ForCausalLM      DeepSeek-V3's: sigmoid, a bias that only the choice sees, experts in groups, a shared expert, first layers dense
    Glm4MoeForCausalLM    the same
    DeepseekV3ForCausalLM the same
    DeepseekV2ForCausalLM softmax; experts in groups or not (topk_method), a shared expert, first layers dense

Experts are stored one by one (``experts.3.up_proj.weight``), or as Transformers 5 has them in memory, all in one tensor a layer
(``experts.gate_up_proj``); ``is_stacked`` says which.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

from .config_fields import Fields, shown
from .errors import CheckpointError

MIXTRAL, QWEN2_MOE, QWEN3_MOE = "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"
DOTS1, GLM4_MOE = "Dots1ForCausalLM", "Glm4MoeForCausalLM"
DEEPSEEK_V2, DEEPSEEK_V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
MIXTURES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, DOTS1, GLM4_MOE, DEEPSEEK_V2, DEEPSEEK_V3)
_MAX_EXPERTS, _MAX_LAYER_EXPERTS = 1 << 14, 200_000  # their tensors are listed before one is looked at
_COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts")  # of experts: Transformers 5 writes another than the hub has


class _Defaults(NamedTuple):
    """What the configuration class of a family with DeepSeek's mixtures assumes of a field that is missing; None: it must be there."""

    num_shared: int | None = None
    first_mixture: int = 0
    normalizes: bool = False
    scaling_factor: float = 1.0
    num_groups: int = 1
    num_top_groups: int = 1


_DEEPSEEK_MIXTURES = {
    DOTS1: _Defaults(),
    GLM4_MOE: _Defaults(num_shared=1, first_mixture=1, normalizes=True),
    DEEPSEEK_V2: _Defaults(num_shared=2),
    DEEPSEEK_V3: _Defaults(num_shared=1, first_mixture=3, normalizes=True, scaling_factor=2.5, num_groups=8, num_top_groups=4),
}


@dataclass(frozen=True)
class MixtureConfig:
    """The sizes and variants of a model's mixture layers.

    Args:
        layers: which layers are mixtures; the others are dense.
        num_experts: routed experts in each of them.
        top_k: how many of these a token goes to.
        expert_size: width of an expert's MLP.
        shared_size: width of the shared expert's MLP; 0 where there is none.
        has_shared_gate: the shared expert's output is weighted by a sigmoid of its own.
        scoring: "softmax" over the experts, or "sigmoid" of each; always in float32.
        has_correction_bias: experts are chosen by score plus a learned bias, and weighted by the score.
        normalizes: the weights of a token's experts are divided by their sum.
        scaling_factor: weights are multiplied by it at the end.
        num_groups: the experts stand in so many groups of equal size ...
        num_top_groups: ... and a token's experts are taken from so many of them, those with the best best expert or, with a
            correction bias, with the best sum of two experts.
        block_name: of the mixture within a layer, in the checkpoint.
        linear_names: an expert's gate, up and down.
        shared_name: of the shared expert.
        is_stacked: the checkpoint has all experts of a layer in one tensor.
    """

    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int = 0
    has_shared_gate: bool = False
    scoring: str = "softmax"
    has_correction_bias: bool = False
    normalizes: bool = False
    scaling_factor: float = 1.0
    num_groups: int = 1
    num_top_groups: int = 1
    block_name: str = "mlp"
    linear_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_name: str = "shared_expert"
    is_stacked: bool = False


def read_mixture(fields: Fields, architecture: str, num_layers: int, stored: Container[str]) -> MixtureConfig:
    """Read the mixture of one of ``MIXTURES``.

    Args:
        fields: of config.json.
        architecture: the model's.
        num_layers: in all.
        stored: the names of the checkpoint's tensors, which tell how its experts are stored.

    Raises:
        CheckpointError: a field that is missing or out of range; names it.
    """
    num_experts = _read_num_experts(fields, num_layers)
    top_k = fields.whole("num_experts_per_tok", high=num_experts)
    layers = _read_layers(fields, architecture, num_layers)
    block_name = "block_sparse_moe" if architecture == MIXTRAL else "mlp"
    # stacked experts lie in "mlp" in every family, whatever the hub calls the block
    is_stacked = any(f"model.layers.{layer}.mlp.experts.gate_up_proj" in stored for layer in layers)
    if architecture == MIXTRAL:
        return MixtureConfig(
            layers=layers,
            num_experts=num_experts,
            top_k=top_k,
            expert_size=fields.whole("intermediate_size"),
            normalizes=True,
            block_name="mlp" if is_stacked else block_name,
            linear_names=("w1", "w3", "w2"),
            is_stacked=is_stacked,
        )
    expert_size = fields.whole("moe_intermediate_size")
    if architecture in _DEEPSEEK_MIXTURES:
        has_sigmoid, defaults = architecture != DEEPSEEK_V2, _DEEPSEEK_MIXTURES[architecture]
        num_groups, num_top_groups = _read_groups(fields, architecture, num_experts, top_k)
        return MixtureConfig(
            layers=layers,
            num_experts=num_experts,
            top_k=top_k,
            expert_size=expert_size,
            shared_size=expert_size * fields.whole("n_shared_experts", defaults.num_shared),
            scoring="sigmoid" if has_sigmoid else "softmax",
            has_correction_bias=has_sigmoid,
            normalizes=fields.flag("norm_topk_prob", defaults.normalizes),
            scaling_factor=fields.number("routed_scaling_factor", defaults.scaling_factor),
            num_groups=num_groups,
            num_top_groups=num_top_groups,
            shared_name="shared_experts",
            is_stacked=is_stacked,
        )
    has_shared = architecture == QWEN2_MOE
    return MixtureConfig(
        layers=layers,
        num_experts=num_experts,
        top_k=top_k,
        expert_size=expert_size,
        shared_size=fields.whole("shared_expert_intermediate_size") if has_shared else 0,
        has_shared_gate=has_shared,
        normalizes=fields.flag("norm_topk_prob"),
        is_stacked=is_stacked,
    )


def _read_num_experts(fields: Fields, num_layers: int) -> int:
    name = next((name for name in _COUNT_NAMES if fields.values.get(name) is not None), _COUNT_NAMES[0])
    num_experts = fields.whole(name, high=_MAX_EXPERTS)
    if num_experts * num_layers > _MAX_LAYER_EXPERTS:
        raise CheckpointError(
            f"{fields.where}: {name} is {num_experts} in {num_layers} layers; together they must not have more than {_MAX_LAYER_EXPERTS}"
        )
    return num_experts


def _read_layers(fields: Fields, architecture: str, num_layers: int) -> tuple[int, ...]:
    if architecture == MIXTRAL:
        return tuple(range(num_layers))
    if architecture in _DEEPSEEK_MIXTURES:
        return tuple(range(fields.whole("first_k_dense_replace", _DEEPSEEK_MIXTURES[architecture].first_mixture, low=0), num_layers))
    step, dense = fields.whole("decoder_sparse_step", 1), set(fields.whole_numbers("mlp_only_layers"))
    return tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense)


def _read_groups(fields: Fields, architecture: str, num_experts: int, top_k: int) -> tuple[int, int]:
    """Return how many groups there are and how many of them a token's experts may be of."""
    method = fields.get("topk_method", "greedy" if architecture == DEEPSEEK_V2 else "noaux_tc")
    _check_routing(fields, architecture, method)
    if method == "greedy":
        return 1, 1
    defaults = _DEEPSEEK_MIXTURES[architecture]
    num_groups = fields.whole("n_group", defaults.num_groups, high=num_experts)
    num_top_groups = fields.whole("topk_group", defaults.num_top_groups, high=num_groups)
    group_size = num_experts // num_groups
    if num_experts % num_groups or group_size < 2:  # a group counts for its two best experts
        raise CheckpointError(f"{fields.where}: n_group is {num_groups} for {num_experts} experts; groups must be equal, of two at least")
    if top_k > num_top_groups * group_size:
        raise CheckpointError(
            f"{fields.where}: num_experts_per_tok is {top_k}, but topk_group {num_top_groups} leaves {num_top_groups * group_size} experts"
        )
    return num_groups, num_top_groups


def _check_routing(fields: Fields, architecture: str, method: object) -> None:
    """Refuse what a family's own code does not have, or what two of its implementations do not agree on."""
    is_v2 = architecture == DEEPSEEK_V2
    methods, scoring = (("greedy", "group_limited_greedy"), "softmax") if is_v2 else (("noaux_tc",), "sigmoid")
    if method not in methods:
        raise CheckpointError(f"{fields.where}: topk_method is {shown(method)}; {architecture} has {' and '.join(methods)}")
    if fields.get("scoring_func", scoring) != scoring:
        raise CheckpointError(f"{fields.where}: scoring_func is {shown(fields.get('scoring_func'))}; {architecture} has {scoring}")
    if fields.get("moe_layer_freq", 1) != 1:
        raise CheckpointError(f"{fields.where}: moe_layer_freq is {shown(fields.get('moe_layer_freq'))}; only 1 is supported")
    if is_v2 and fields.flag("norm_topk_prob"):
        raise CheckpointError(
            f"{fields.where}: norm_topk_prob is true; DeepSeek's own code then leaves out routed_scaling_factor, Transformers ignores the "
            "field, and no released checkpoint has it: set it to false"
        )


def mixture_shapes(mixture: MixtureConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return the full shape of every tensor of one mixture layer, by its name within the layer."""
    block, (gate, up, down) = mixture.block_name, mixture.linear_names
    count, width = mixture.num_experts, mixture.expert_size
    shapes: dict[str, tuple[int, ...]] = {f"{block}.gate.weight": (count, hidden_size)}
    if mixture.has_correction_bias:
        shapes[f"{block}.gate.e_score_correction_bias"] = (count,)
    if mixture.is_stacked:
        shapes[f"{block}.experts.gate_up_proj"] = (count, 2 * width, hidden_size)
        shapes[f"{block}.experts.down_proj"] = (count, hidden_size, width)
    else:
        for prefix in (f"{block}.experts.{expert}" for expert in range(count)):
            shapes[f"{prefix}.{gate}.weight"] = shapes[f"{prefix}.{up}.weight"] = (width, hidden_size)
            shapes[f"{prefix}.{down}.weight"] = (hidden_size, width)
    if mixture.shared_size:
        prefix = f"{block}.{mixture.shared_name}"
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (mixture.shared_size, hidden_size)
        shapes[f"{prefix}.down_proj.weight"] = (hidden_size, mixture.shared_size)
    if mixture.has_shared_gate:
        shapes[f"{block}.{mixture.shared_name}_gate.weight"] = (1, hidden_size)
    return shapes


def place_experts(num_experts: int, rank: int, size: int) -> range:
    """Return the experts of one of ``size`` ranks: contiguous, as even as can be (7 on 2 are 3 and 4), none where there are fewer."""
    return range(num_experts * rank // size, num_experts * (rank + 1) // size)
