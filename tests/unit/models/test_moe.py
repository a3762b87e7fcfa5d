"""Mixtures of experts against Transformers' own modules, alone and spread over ranks, packed and not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.threads import ThreadCommunicator, run_ranks
from torch import Tensor, nn
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.dots1.modeling_dots1 import Dots1MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from zspmd.config_fields import Fields
from zspmd.expert_placement import first_placement
from zspmd.mixture_config import DEEPSEEK_V2, DEEPSEEK_V3, DOTS1, MIXTRAL, QWEN2_MOE, QWEN3_MOE, MixtureConfig, read_mixture
from zspmd.models.expert_axis import ExpertAxis
from zspmd.models.experts import Experts
from zspmd.models.group_products import PlainGroup
from zspmd.models.layers import ShardedModule
from zspmd.models.moe import Mixture

CPU = torch.device("cpu")
PREFIX = "model.layers.0."
STORED = {f"{PREFIX}mlp.experts.gate_up_proj"}  # blocks have their experts in one tensor, as Transformers has them in memory
HIDDEN, WIDTH = 32, 24
GROUPED = {"n_group": 4, "topk_group": 2, "n_routed_experts": 12, "num_experts_per_tok": 3}
SHARED = {"moe_intermediate_size": WIDTH, "n_shared_experts": 2, "routed_scaling_factor": 2.5}

BLOCKS: dict[str, tuple[type[nn.Module], str, str, dict[str, Any]]] = {
    "mixtral": (MixtralSparseMoeBlock, MIXTRAL, "mixtral", {"num_local_experts": 7, "intermediate_size": WIDTH}),
    "qwen2": (
        Qwen2MoeSparseMoeBlock,
        QWEN2_MOE,
        "qwen2_moe",
        {"num_experts": 7, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": 12},
    ),
    "qwen2-normalized": (
        Qwen2MoeSparseMoeBlock,
        QWEN2_MOE,
        "qwen2_moe",
        {"num_experts": 5, "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": 12, "norm_topk_prob": True},
    ),
    "qwen3": (
        Qwen3MoeSparseMoeBlock,
        QWEN3_MOE,
        "qwen3_moe",
        {"num_experts": 7, "moe_intermediate_size": WIDTH, "norm_topk_prob": True, "num_experts_per_tok": 3},
    ),
    "dots1": (Dots1MoE, DOTS1, "dots1", {**SHARED, **GROUPED, "norm_topk_prob": True}),
    "deepseek-v3": (DeepseekV3MoE, DEEPSEEK_V3, "deepseek_v3", {**SHARED, **GROUPED, "norm_topk_prob": False}),
    "deepseek-v2-groups": (DeepseekV2Moe, DEEPSEEK_V2, "deepseek_v2", {**SHARED, **GROUPED, "topk_method": "group_limited_greedy"}),
    "deepseek-v2-greedy": (DeepseekV2Moe, DEEPSEEK_V2, "deepseek_v2", {**SHARED, **GROUPED, "topk_method": "greedy"}),
}


def make_block(name: str, **changes: Any) -> tuple[nn.Module, MixtureConfig]:
    """Return one of ``BLOCKS`` with random weights, biases too, and how our reading of its config describes it."""
    kind, architecture, model_type, fields = BLOCKS[name]
    config = transformers.AutoConfig.for_model(model_type, **{"hidden_size": HIDDEN, "num_experts_per_tok": 2, **fields, **changes})
    torch.manual_seed(3)
    block = kind(config).eval().requires_grad_(False)
    for tensor in [*block.parameters(), *block.buffers()]:
        tensor.normal_(std=0.3)
    return block, read_mixture(Fields({**config.to_dict(), "first_k_dense_replace": 0}, "config"), architecture, 1, STORED)


def build(
    block: nn.Module,
    mixture: MixtureConfig,
    communicator: Any,
    *,
    hidden: int = HIDDEN,
    dtype: torch.dtype = torch.float32,
    is_packed: bool = False,
    input_scale: Tensor | None = None,
) -> Mixture:
    """Return our mixture on one rank, its parameters filled from the block's tensors."""
    placement = first_placement(mixture.num_experts, 0)
    ours = Mixture(f"{PREFIX}mlp", mixture, hidden, communicator, ExpertAxis(communicator), placement, dtype=dtype, device=CPU)
    stored = {f"{PREFIX}mlp.{name}": tensor for name, tensor in block.state_dict().items()}
    for module in ours.modules():
        if isinstance(module, ShardedModule):
            for shard in module.shards():
                assert shard.source is not None
                shard.parameter[shard.rows] = stored[shard.name][shard.source]
    if is_packed:
        ours.pack(input_scale)
    return ours


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_transformers(name: str, size: int, is_packed: bool) -> None:
    """Within 1e-5 in float32, on every rank the same bits, with one all-reduce whatever the block has."""
    block, mixture = make_block(name)
    x = torch.randn(33, HIDDEN, generator=torch.Generator().manual_seed(1))
    wanted = block(x[None])[0]

    @torch.inference_mode()
    def compute(communicator: ThreadCommunicator) -> list[Tensor]:
        ours = build(block, mixture, communicator, is_packed=is_packed)
        return [ours(x), *(ours(x[i : i + 1]) for i in (0, 17))]

    outputs = run_ranks(size, compute)
    for together, first, later in outputs:
        torch.testing.assert_close(together, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat((first, later)), wanted[[0, 17]], atol=1e-5, rtol=1e-5)
        assert torch.equal(together, outputs[0][0])


def test_odd_sizes_take_plain_products() -> None:
    """Rows that are no multiple of 16 bytes, which torch's grouped product refuses."""
    block, mixture = make_block("mixtral", hidden_size=6, intermediate_size=5)
    x = torch.randn(9, 6)
    with torch.inference_mode():
        ours = run_ranks(1, lambda communicator: build(block, mixture, communicator, hidden=6))[0]
        torch.testing.assert_close(ours(x), block(x[None])[0], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_ranks_without_experts_add_nothing() -> None:
    block, mixture = make_block("mixtral", num_local_experts=2)
    x = torch.randn(5, HIDDEN)
    wanted = block(x[None])[0]
    for out in run_ranks(4, lambda communicator: build(block, mixture, communicator)(x)):
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


class Counting:
    """A rank of two that counts its all-reduces and adds nothing."""

    rank, size, num_sums = 0, 2, 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.num_sums += 1
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        raise AssertionError("a mixture gathers nothing")


@pytest.mark.parametrize("name", ["mixtral", "qwen2", "dots1"])
@torch.inference_mode()
def test_one_all_reduce_a_layer(name: str) -> None:
    block, mixture = make_block(name)
    communicator = Counting()
    build(block, mixture, communicator)(torch.randn(4, HIDDEN))
    assert communicator.num_sums == 1


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
@torch.inference_mode()
def test_a_token_does_not_see_its_batch_mates(is_packed: bool) -> None:
    """Not even one that is not a number, nor where it stands among them."""
    block, mixture = make_block("qwen3")
    ours = run_ranks(1, lambda communicator: build(block, mixture, communicator, is_packed=is_packed))[0]
    x = torch.randn(16, HIDDEN)
    wanted = ours(x)
    order, atol = torch.randperm(16), 1e-6
    torch.testing.assert_close(ours(x[order]), wanted[order], atol=atol, rtol=0)
    spoiled = x.clone()
    spoiled[5] = torch.nan
    out = ours(spoiled)
    others = [i for i in range(16) if i != 5]
    assert out[5].isnan().all()
    torch.testing.assert_close(out[others], wanted[others], atol=atol, rtol=0)


@torch.inference_mode()
def test_bfloat16_is_routed_in_float32() -> None:
    """The same experts as in float32 for the same hidden states, and nearly the same output."""
    block, mixture = make_block("dots1")
    x = torch.randn(40, HIDDEN).bfloat16()

    def compute(communicator: ThreadCommunicator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exact = build(block, mixture, communicator)
        rounded = build(block, mixture, communicator, dtype=torch.bfloat16)
        return exact.router(x.float())[1], rounded.router(x)[1], exact(x.float()), rounded(x)

    choices, rounded_choices, wanted, found = run_ranks(1, compute)[0]
    assert torch.equal(choices, rounded_choices)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.05 * float(wanted.abs().max()), rtol=0)


class Watched(PlainGroup):
    """Notes how many rows it multiplies."""

    def __init__(self, weights: Tensor, seen: list[int]) -> None:
        super().__init__(weights)
        self.seen = seen

    def __call__(self, rows: Tensor, ends: Tensor) -> Tensor:
        self.seen.append(len(rows))
        return super().__call__(rows, ends)


@torch.inference_mode()
def test_a_rank_computes_only_the_rows_of_its_experts_and_counts_them() -> None:
    """Its share of the work, not everything with the rest masked."""
    mixture = make_block("mixtral")[1]
    choices = torch.tensor([[0, 6], [1, 2], [4, 5], [2, 3]])
    seen: list[int] = []

    def compute(communicator: ThreadCommunicator) -> list[list[int]]:
        axis, placement = ExpertAxis(communicator), first_placement(7, 0)
        ours = Experts(f"{PREFIX}mlp", mixture, HIDDEN, axis, placement, dtype=torch.float32, device=CPU)
        ours.multiply_gate_up = Watched(ours.gate_up.view(-1, 2 * WIDTH, HIDDEN), seen)
        ours.forward(torch.zeros(4, HIDDEN), torch.ones(4, 2), choices)
        ours.forward(torch.zeros(1, HIDDEN), torch.ones(1, 2), choices[1:2])
        return [ours.take_loads(), ours.take_loads()]

    loads = run_ranks(2, compute)
    assert sorted(seen) == [2, 4, 4]  # the first rank has experts 0 to 2, and four of the eight choices, and then both
    assert loads == [[[1, 2, 3, 0, 0, 0, 0], [0] * 7], [[0, 0, 0, 1, 1, 1, 1], [0] * 7]]


@torch.inference_mode()
def test_packed_with_a_scale_of_the_inputs() -> None:
    """What a norm leaves out, every product that takes the inputs makes up for."""
    block, mixture = make_block("qwen2")
    x, scale = torch.randn(9, HIDDEN), torch.rand(HIDDEN) + 0.5
    for out in run_ranks(2, lambda communicator: build(block, mixture, communicator, is_packed=True, input_scale=scale)(x)):
        torch.testing.assert_close(out, block((x * scale)[None])[0], atol=1e-5, rtol=1e-5)
