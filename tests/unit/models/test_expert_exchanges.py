"""Tokens of several replicas and the experts that these share: both ways to bring them together against one rank that has all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.threads import ThreadCommunicator, run_ranks
from torch import Tensor

from zspmd.expert_placement import Placement, first_placement
from zspmd.mixture_config import MixtureConfig
from zspmd.models.expert_all_to_all import AllToAllExchange
from zspmd.models.expert_axis import ChosenExchange, Compute, Exchange, ExpertAxis, Route
from zspmd.models.expert_gather import GatherExchange
from zspmd.models.moe import Mixture

CPU = torch.device("cpu")
HIDDEN = 6  # rows of bytes that no larger number divides
MIXTURE = MixtureConfig(
    layers=(0,), num_experts=7, top_k=3, expert_size=8, shared_size=4, has_shared_gate=True, normalizes=True, num_groups=1
)
GROUPED = MixtureConfig(layers=(0,), num_experts=6, top_k=2, expert_size=8, scoring="sigmoid", num_groups=3, num_top_groups=2)
COUNTS = {  # of each replica's tokens, and how many the step says that these are at most
    "uneven": ([5, 2], [5, 2]),
    "one token": ([0, 1], [0, 1]),
    "idle": ([4, 0], [4, 0]),
    "fewer than ranks": ([1, 1], [1, 1]),
    "fewer than said": ([5, 0], [7, 8]),
}
MOVED = (6, 5, 4, 3, 0, 2, 1, 0, 6)


class Alone:
    """An axis of one rank."""

    rank, size = 0, 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor[None]


def build(mixture: MixtureConfig, communicator: Any, exchange: Exchange | None, placement: Placement, dtype: torch.dtype) -> Mixture:
    """Return a mixture with random weights, the same on every rank."""
    ours = Mixture("mlp", mixture, HIDDEN, communicator, ExpertAxis(communicator, exchange), placement, dtype=dtype, device=CPU)
    generator = torch.Generator().manual_seed(0)
    router, shared = torch.randn(mixture.num_experts, HIDDEN, generator=generator), torch.randn(200, generator=generator)
    experts = torch.randn(mixture.num_experts, 3 * mixture.expert_size, HIDDEN, generator=generator) * 0.5
    ours.router.score.weight.copy_(router)
    if ours.shared is not None:
        for parameter in ours.shared.parameters():
            parameter.copy_(shared[: parameter.numel()].view_as(parameter))
    for index, expert in enumerate(ours.experts.placed):
        gate_up, down = experts[expert].tensor_split((2 * mixture.expert_size,))
        ours.experts.gate_up.view(-1, 2 * mixture.expert_size, HIDDEN)[index] = gate_up
        ours.experts.down.view(-1, HIDDEN, mixture.expert_size)[index] = down.t()
    return ours


def tokens(counts: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(count, HIDDEN, generator=generator).to(dtype) for count in counts]


def exchange_of(way: str, replicas: ThreadCommunicator, mixture: MixtureConfig, placement: Placement) -> Exchange:
    if way == "gather":
        return GatherExchange(Alone(), replicas)
    return AllToAllExchange(Alone(), replicas, replicas.rank, top_k=mixture.top_k, num_copies=len(placement), device=CPU)


class Fixed:
    """An exchange that returns what it is told to."""

    rank, size = 1, 4

    def __init__(self, out: Tensor) -> None:
        self.out = out

    def run(self, x: Tensor, counts: Sequence[int], route: Route, compute: Compute) -> Tensor:
        return self.out


def test_an_exchange_is_chosen_in_each_step_by_its_tokens() -> None:
    first, second, seen = torch.zeros(1), torch.ones(1), list[Sequence[int]]()

    def is_second(counts: Sequence[int]) -> bool:
        seen.append(counts)
        return max(counts) > 5

    axis = ExpertAxis(Alone(), ChosenExchange(Fixed(first), Fixed(second), is_second))
    assert (axis.rank, axis.size, axis.is_lockstep) == (1, 4, True)
    for counts, out in (([5, 0], first), ([6, 0], second), ([1, 1], first)):
        axis.begin_step(counts)
        assert axis.run(torch.empty(0), lambda x, first: (x, x), lambda x, weights, copies: x) is out
    assert seen == [[5, 0], [6, 0], [1, 1]]


@pytest.mark.parametrize("way", ["gather", "all-to-all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("counts", "said"), COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("mixture", "placement"),
    [
        pytest.param(MIXTURE, first_placement(7, 0), id="plain"),
        pytest.param(MIXTURE, MOVED, id="moved"),
        pytest.param(GROUPED, first_placement(6, 0), id="grouped"),
    ],
)
@torch.inference_mode()
def test_replicas_get_what_one_rank_with_all_experts_gives(
    mixture: MixtureConfig, placement: Placement, counts: list[int], said: list[int], dtype: torch.dtype, way: str
) -> None:
    inputs = tokens(counts, dtype)
    alone = build(mixture, Alone(), None, first_placement(mixture.num_experts, 0), dtype)

    def compute(replicas: ThreadCommunicator) -> tuple[Tensor, list[int]]:
        ours = build(mixture, Alone(), exchange_of(way, replicas, mixture, placement), placement, dtype)
        ours.axis.begin_step(said)
        return ours.forward(inputs[replicas.rank]), ours.experts.take_loads()

    outputs = run_ranks(2, compute)
    atol = 1e-5 if dtype == torch.float32 else 0.05 * max(float(alone.forward(x).abs().max()) for x in inputs if len(x))
    for x, (out, _) in zip(inputs, outputs, strict=True):
        assert out.dtype == dtype
        torch.testing.assert_close(out, alone.forward(x) if len(x) else x, atol=atol, rtol=1e-5)
    computed = said if way == "gather" else counts  # what is gathered beyond the tokens is padding
    assert sum(sum(loads) for _, loads in outputs) == sum(computed) * mixture.top_k


@pytest.mark.parametrize(("counts", "said"), COUNTS.values(), ids=COUNTS)
@torch.inference_mode()
def test_the_ranks_of_a_replica_share_its_tokens_out(counts: list[int], said: list[int]) -> None:
    """Two replicas of two tensor-parallel ranks each; a token is sent once."""
    inputs, sent = tokens(counts, torch.float32), list[int]()
    alone = build(MIXTURE, Alone(), None, first_placement(7, 0), torch.float32)

    class Half:
        """The tensor-parallel ranks within the four, whose sums are those of the two."""

        size = 2

        def __init__(self, every: ThreadCommunicator) -> None:
            self.rank, self._every = every.rank % 2, every

        def all_reduce(self, tensor: Tensor) -> Tensor:
            longest = max(counts)
            padded = torch.cat((tensor, tensor.new_zeros(longest - len(tensor), HIDDEN)))
            first = self._every.rank - self.rank
            return tensor.copy_(self._every.all_gather(padded)[first : first + 2, : len(tensor)].sum(0))

        def all_gather(self, tensor: Tensor) -> Tensor:
            raise AssertionError("a mixture gathers nothing")

    def compute(every: ThreadCommunicator) -> Tensor:
        half = Half(every)
        exchange = AllToAllExchange(half, every, every.rank // 2, top_k=3, num_copies=7, device=CPU)
        ours = build(MIXTURE, half, exchange, first_placement(7, 0), torch.float32)
        ours.shared = None
        ours.axis.begin_step(said)
        out = ours.forward(inputs[every.rank // 2])
        if not len(out):  # of an idle replica: the others still wait for it in the test's all-reduce
            half.all_reduce(out)
        sent.append(sum(ours.experts.take_loads()))
        return out

    alone.shared = None
    for rank, out in enumerate(run_ranks(4, compute)):
        x = inputs[rank // 2]
        torch.testing.assert_close(out, alone.forward(x) if len(x) else x, atol=1e-5, rtol=1e-5)
    assert sum(sent) == sum(counts) * 3
