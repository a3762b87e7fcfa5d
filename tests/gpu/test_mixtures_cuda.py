"""Mixtures of experts on a CUDA device: torch's grouped product, and a whole mixture, against a CPU."""

from __future__ import annotations

import pytest
import torch
from support.threads import ThreadCommunicator, run_ranks

from zspmd.expert_placement import first_placement
from zspmd.mixture_config import MixtureConfig
from zspmd.models.expert_all_to_all import AllToAllExchange
from zspmd.models.expert_axis import Exchange, ExpertAxis
from zspmd.models.expert_gather import GatherExchange
from zspmd.models.group_products import PlainGroup, build_group_product, has_grouped_product
from zspmd.models.moe import Mixture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")]
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16]


class Alone:
    """An axis of one rank."""

    rank, size = 0, 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[None]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("counts", [[3, 0, 1, 0], [0, 0, 0, 9], [8, 8, 8, 8]], ids=["empty-groups", "all-in-the-last", "even"])
@torch.inference_mode()
def test_grouped_products_are_those_of_each_group(dtype: torch.dtype, counts: list[int]) -> None:
    rows, weights = torch.randn(sum(counts), 64, dtype=dtype, device=CUDA), torch.randn(4, 32, 64, dtype=dtype, device=CUDA)
    ends = torch.tensor(counts, device=CUDA).cumsum(0).int()
    assert has_grouped_product(weights) == (torch.cuda.get_device_capability() >= (8, 0))
    found = build_group_product(weights, is_packed=True)(rows, ends)  # there is nothing to pack on a GPU
    torch.testing.assert_close(found, PlainGroup(weights)(rows, ends))


@pytest.mark.parametrize("size", [1, 2])
@torch.inference_mode()
def test_a_mixture_is_that_of_a_cpu(size: int) -> None:
    mixture = MixtureConfig(layers=(0,), num_experts=7, top_k=2, expert_size=32, shared_size=16, has_shared_gate=True, normalizes=True)
    x = torch.randn(33, 64)

    def compute(device: torch.device) -> torch.Tensor:
        def run(communicator: ThreadCommunicator) -> torch.Tensor:
            ours = Mixture(
                "mlp", mixture, 64, communicator, ExpertAxis(communicator), first_placement(7, 0), dtype=torch.float32, device=device
            )
            generator = torch.Generator().manual_seed(0)
            for parameter in ours.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            return ours.forward(x.to(device))

        return run_ranks(size, run)[0].cpu()

    torch.testing.assert_close(compute(CUDA), compute(torch.device("cpu")), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["gather", "all-to-all"])
@torch.inference_mode()
def test_replicas_reach_experts_and_their_copies_as_on_a_cpu(way: str) -> None:
    mixture = MixtureConfig(layers=(0,), num_experts=7, top_k=3, expert_size=32, normalizes=True)
    inputs, placement = [torch.randn(count, 64) for count in (9, 2)], first_placement(7, 3)
    weights = torch.randn(7 * 64 + 7 * 3 * 32 * 64) * 0.1

    def compute(device: torch.device) -> list[torch.Tensor]:
        def run(replicas: ThreadCommunicator) -> torch.Tensor:
            exchange: Exchange = GatherExchange(Alone(), replicas)
            if way == "all-to-all":
                exchange = AllToAllExchange(Alone(), replicas, replicas.rank, top_k=3, num_copies=10, device=device)
            axis = ExpertAxis(Alone(), exchange)
            ours = Mixture("mlp", mixture, 64, Alone(), axis, placement, dtype=torch.float32, device=device)
            ours.router.score.weight.copy_(weights[: 7 * 64].view(7, 64))
            for index, expert in enumerate(ours.experts.placed):
                gate_up, down = weights[7 * 64 :].view(7, 3 * 32, 64)[expert].tensor_split((64,))
                ours.experts.gate_up.view(-1, 64, 64)[index] = gate_up.to(device)
                ours.experts.down.view(-1, 64, 32)[index] = down.t().to(device)
            axis.begin_step([len(x) for x in inputs])
            return ours.forward(inputs[replicas.rank].to(device)).cpu()

        return run_ranks(2, run)

    for found, wanted in zip(compute(CUDA), compute(torch.device("cpu")), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
