"""Mixtures of experts on a CUDA device: torch's grouped product, and a whole mixture, against a CPU."""

from __future__ import annotations

import pytest
import torch
from support.threads import ThreadCommunicator, run_ranks

from zspmd.mixture_config import MixtureConfig
from zspmd.models.expert_axis import ExpertAxis
from zspmd.models.group_products import build_group_product, has_grouped_product, multiply_one_by_one
from zspmd.models.moe import Mixture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a CUDA device")]
CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("counts", [[3, 0, 1, 0], [0, 0, 0, 9], [8, 8, 8, 8]], ids=["empty-groups", "all-in-the-last", "even"])
@torch.inference_mode()
def test_grouped_products_are_those_of_each_group(dtype: torch.dtype, counts: list[int]) -> None:
    rows, weights = torch.randn(sum(counts), 64, dtype=dtype, device=CUDA), torch.randn(4, 32, 64, dtype=dtype, device=CUDA)
    ends = torch.tensor(counts, device=CUDA).cumsum(0).int()
    assert has_grouped_product(weights) == (torch.cuda.get_device_capability() >= (8, 0))
    found = build_group_product(weights, is_packed=True)(rows, ends)  # there is nothing to pack on a GPU
    torch.testing.assert_close(found, multiply_one_by_one(rows, weights, ends))


@pytest.mark.parametrize("size", [1, 2])
@torch.inference_mode()
def test_a_mixture_is_that_of_a_cpu(size: int) -> None:
    mixture = MixtureConfig(layers=(0,), num_experts=7, top_k=2, expert_size=32, shared_size=16, has_shared_gate=True, normalizes=True)
    x = torch.randn(33, 64)

    def compute(device: torch.device) -> torch.Tensor:
        def run(communicator: ThreadCommunicator) -> torch.Tensor:
            ours = Mixture("mlp", mixture, 64, communicator, ExpertAxis(communicator), dtype=torch.float32, device=device)
            generator = torch.Generator().manual_seed(0)
            for parameter in ours.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            return ours.forward(x.to(device))

        return run_ranks(size, run)[0].cpu()

    torch.testing.assert_close(compute(CUDA), compute(torch.device("cpu")), atol=1e-4, rtol=1e-4)
