"""Conformance of every backend of collectives that this machine can run, between real ranks of a launch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import vendor_backend
from support.distributions import install_distribution
from support.groups import DEADLINES
from support.script_runs import run, script

import zspmd

pytestmark = pytest.mark.usefixtures("leak_check")
NUM_GPUS = torch.cuda.device_count()
CLASSES = {
    "shm": "SharedMemoryCommunicator",
    "gloo": "GlooCommunicator",
    "nccl": "NcclCommunicator",
    "nccl-raw": "NcclRawCommunicator",
}
CPU_BACKENDS = pytest.mark.parametrize("backend", ["shm", "gloo"])
VENDOR = "acme-interconnect-v2"
TIMEOUT_S = 100.0


def backends_and_sizes() -> list[Any]:
    """Return a parameter for each backend and number of ranks, with the reason where it cannot run here.

    Of those on CPUs, four ranks take long, and gloo's two show little that its three do not.
    """
    parameters = []
    for backend in CLASSES:
        for world_size in (2, 3, 4):
            lacks = backend.startswith("nccl") and world_size > NUM_GPUS
            reason = f"NCCL takes one rank a CUDA device: needs {world_size}, there are {NUM_GPUS}"
            is_long = world_size == 4 or (backend, world_size) == ("gloo", 2)
            marks = [pytest.mark.skipif(lacks, reason=reason), *([pytest.mark.long] if is_long else [])]
            parameters.append(pytest.param(backend, world_size, id=f"{backend} {world_size}", marks=marks))
    return parameters


def launch(world_size: int, **options: Any) -> zspmd.WorkerGroup:
    arguments: dict[str, Any] = {"world_size": world_size, "output_ranks": "all", "deadlines": DEADLINES, **options}
    return zspmd.launch("support.collectives:Collectives", **arguments)


@pytest.mark.parametrize(("backend", "world_size"), backends_and_sizes())
async def test_conformance(backend: str, world_size: int, tmp_path: Path) -> None:
    """One launch for all cases of a backend and size: it is the launch that takes long."""
    is_on_cpu = not backend.startswith("nccl")
    async with launch(world_size, communicator=backend, devices="cpu" if is_on_cpu else "cuda") as group:
        assert await group.call("backend", "tp") == [CLASSES[backend]] * world_size
        assert await group.call("conform", "small", timeout_s=TIMEOUT_S) == [[]] * world_size
        rounding = await group.call("rounding")
        assert max(rounding[0][:-1]) <= 1.0
        assert rounding == [rounding[0]] * world_size, "the ranks' bits differ"
        assert await group.call("pair_alone", ranks=[0, 1]) == [True] * 2
        assert await group.call("barrier", str(tmp_path / "late"), world_size - 1) == [True] * world_size
        if is_on_cpu:
            assert await group.call("refusals") == [[]] * world_size
            assert await group.call("lazy") == [[str([1 - 2j] * world_size), str([-2.0] * 2 * world_size), str([1 - 2j])]] * world_size
        if world_size == 2:
            assert await group.call("conform", "large", timeout_s=TIMEOUT_S) == [[]] * world_size
        if world_size == 4:  # more ranks than the cores of many a machine
            assert await group.call("conform", "mixed", 500, 7, timeout_s=TIMEOUT_S) == [[]] * world_size
        closed = await group.call("close_and_use")
        assert closed == ["the communicator of axis tp has been closed; make a new one"] * world_size


@CPU_BACKENDS
async def test_axes_do_not_mix(backend: str) -> None:
    async with launch(4, parallel=zspmd.ParallelConfig(dp=2, tp=2, ep=4), communicator=backend) as group:
        # ranks, rank, size, is_first, is_last, next, previous, whether it is its own cpu, sum of the world ranks
        assert (await group.call("places", "tp"))[2:] == [
            [[2, 3], 0, 2, True, False, 1, 1, True, 5],
            [[2, 3], 1, 2, False, True, 0, 0, True, 5],
        ]
        assert (await group.call("places", "dp"))[1] == [[1, 3], 0, 2, True, False, 1, 1, True, 4]
        for axis in ("ep", "world"):
            assert (await group.call("places", axis))[3] == [[0, 1, 2, 3], 3, 4, False, True, 0, 2, True, 6]
        assert (await group.call("places", "pp"))[2] == [[2], 0, 1, True, True, 0, 0, True, 2]
        assert await group.call("backend", "pp") == ["SoloCommunicator"] * 4


async def test_one_rank_needs_no_backend() -> None:
    async with launch(1) as group:
        assert await group.call("backend", "tp") == ["SoloCommunicator"]
        assert await group.call("conform", "small", timeout_s=TIMEOUT_S) == [[]]
        assert await group.call("barrier", "/dev/null", 1) == [True]


async def test_a_vendor_adds_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution with an entry point is all it takes: driver and ranks find it by its name."""
    assert vendor_backend.__file__ is not None
    shutil.copy(vendor_backend.__file__, tmp_path / "acme_collectives.py")
    install_distribution(tmp_path, "acme", {VENDOR: "acme_collectives:create"})
    monkeypatch.syspath_prepend(str(tmp_path))
    async with launch(2, communicator=VENDOR) as group:
        assert await group.call("backend", "tp") == ["StoreCommunicator"] * 2
        assert await group.call("conform", "mixed", 60, 3, timeout_s=TIMEOUT_S) == [[]] * 2


async def test_the_store_serves_several_threads_of_every_rank() -> None:
    async with zspmd.launch("support.workers:StoreUser", world_size=3, output_ranks="all", deadlines=DEADLINES, preload=()) as group:
        assert await group.call("exchange", 6) == [[b"%d/%d" % ((rank + 1) % 3, thread) for thread in range(6)] for rank in range(3)]
        counts = [count for counts in await group.call("count", 50) for count in counts]
        assert sorted(counts) == list(range(1, 151))
        for answer in await group.call("absent"):
            assert answer == ["no value for nobody sets this within 0.05 s; another rank has not set it"]
        assert await group.call("exchange", 6)


def test_a_script_makes_its_communicators_with_the_coordinator() -> None:
    done = run("-n", "2", script("communicator"))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f"rank {rank} has summed by SharedMemoryCommunicator and GlooCommunicator" in done.stdout
