"""The raw NCCL library on one GPU, where its group has one rank. Several ranks are in tests/spmd/test_communicators.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support.conformance import Conformance, small_cases

from zspmd.topology import AxisGroup
from zspmd.workers.communicators.communicator import Communicator
from zspmd.workers.communicators.setup import CommunicatorSetup
from zspmd.workers.torch_store import TorchStoreAdapter

DEVICE = "cuda:0"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def communicator() -> Iterator[Communicator]:
    from zspmd.workers.communicators.nccl_raw import create_nccl_raw

    store = TorchStoreAdapter(dist.HashStore(), timeout_s=30.0)  # type: ignore[attr-defined]  # torch's stubs lack it
    setup = CommunicatorSetup(group=AxisGroup("tp", (0,), 0), store=store, device=DEVICE, address="127.0.0.1", timeout_s=30.0)
    with create_nccl_raw(setup) as communicator:
        yield communicator


def test_conformance_of_the_raw_library(communicator: Communicator) -> None:
    conformance = Conformance(communicator)
    cases = [case for case in small_cases() if case.layout != "numpy"]
    assert [wrong for wrong in map(conformance.check, cases) if wrong] == []
    communicator.barrier()


def test_a_cuda_graph_captures_an_all_reduce(communicator: Communicator) -> None:
    value = torch.ones(1024, device=DEVICE)
    communicator.all_reduce(value)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value.add_(1.0)
        communicator.all_reduce(value)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(value, torch.full((1024,), 4.0, device=DEVICE))


def test_a_tensor_elsewhere_is_refused(communicator: Communicator) -> None:
    with pytest.raises(ValueError, match="a collective on cuda:0 got a tensor on cpu; move it first, or use the communicator's cpu"):
        communicator.all_reduce(torch.ones(1))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL takes one rank a device")
@pytest.mark.parametrize("backend", ["nccl", "nccl-raw"])
async def test_a_gpu_axis_has_a_cpu_side(backend: str) -> None:
    import zspmd

    group = zspmd.launch("support.collectives:Collectives", world_size=2, output_ranks="all", devices="cuda", communicator=backend)
    async with group:
        assert await group.call("cpu_side", "tp") == [["GlooCommunicator", 3.0]] * 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL takes one rank a device")
async def test_a_cuda_graph_captures_an_all_reduce_of_two_ranks() -> None:
    import zspmd

    group = zspmd.launch("support.collectives:Collectives", world_size=2, output_ranks="all", devices="cuda", communicator="nccl-raw")
    async with group:
        assert await group.call("captured", 3) == [[8.0, True]] * 2
