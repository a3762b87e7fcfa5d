"""Collectives between real ranks, over each backend for CPUs: sums, gathers and broadcasts of any layout, and the store."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.groups import launch

import zspmd
from zspmd.transport import codec
from zspmd.workers.torch_bridge import register_torch

pytestmark = pytest.mark.usefixtures("leak_check")
BACKENDS = {"gloo": "ProcessGroupCommunicator", "shm": "SharedMemoryCommunicator"}
WORLDS = [(backend, world_size) for backend in BACKENDS for world_size in (2, 4)]
CASES = [
    # operation, kind, dtype, shape, layout
    ("all_reduce", "torch", "float32", [3, 5], "dense"),
    ("all_reduce", "torch", "float32", [200, 1000], "dense"),  # more than one slot of shared memory
    ("all_reduce", "torch", "float64", [7], "strided"),
    ("all_reduce", "torch", "bfloat16", [33, 3], "dense"),
    ("all_reduce", "torch", "float16", [9], "strided"),
    ("all_reduce", "torch", "int64", [4, 4], "dense"),
    ("all_reduce", "torch", "float32", [], "dense"),
    ("all_reduce", "torch", "float32", [0, 3], "dense"),
    ("all_reduce", "numpy", "float64", [5, 2], "dense"),
    ("all_reduce", "numpy", "int32", [6], "strided"),
    ("all_gather", "torch", "float32", [3, 5], "dense"),
    ("all_gather", "torch", "float32", [100, 1000], "dense"),
    ("all_gather", "torch", "bfloat16", [3, 2], "strided"),
    ("all_gather", "torch", "bool", [5], "dense"),
    ("all_gather", "torch", "int64", [], "dense"),
    ("all_gather", "numpy", "float32", [4, 3], "strided"),
    ("all_gather", "numpy", "uint8", [7], "dense"),
    ("broadcast", "torch", "float32", [200, 1000], "dense"),
    ("broadcast", "torch", "bfloat16", [5], "strided"),
    ("broadcast", "numpy", "int64", [2, 3], "strided"),
    ("broadcast", "numpy", "float32", [3], "dense"),
]
CASE_IDS = [" ".join(map(str, case)) for case in CASES]


@pytest.fixture(autouse=True)
def bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_bridges", {})
    register_torch()


def share(rank: int, dtype: str, shape: list[int]) -> torch.Tensor:
    """Return what a rank brings: the same numbers as ``support.workers.Collectives.share``."""
    return (torch.arange(math.prod(shape)).reshape(shape) % 13 + rank).to(getattr(torch, dtype))


def expected(operation: str, shares: list[torch.Tensor], source: int) -> torch.Tensor:
    if operation == "all_gather":
        return torch.stack(shares)
    if operation == "broadcast":
        return shares[source]
    wide = torch.float64 if shares[0].is_floating_point() else torch.int64
    return torch.stack(shares).to(wide).sum(0).to(shares[0].dtype)


def as_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value.copy())


@pytest.mark.parametrize(("backend", "world_size"), WORLDS, ids=[f"{backend} {size}" for backend, size in WORLDS])
async def test_collectives(backend: str, world_size: int, tmp_path: Path) -> None:
    """One launch for all cases of a backend and size: it is the launch that takes long."""
    async with launch("Collectives", world_size, communicator=backend, preload=("torch",)) as group:
        assert await group.call("backend", "tp") == [BACKENDS[backend]] * world_size
        for case, name in zip(CASES, CASE_IDS):
            operation, kind, dtype, shape, layout = case
            source = world_size - 1
            results = await group.call("collective", operation, "tp", kind, dtype, shape, layout, source=source)
            wanted = expected(operation, [share(rank, dtype, shape) for rank in range(world_size)], source)
            for rank, result in enumerate(results):
                assert isinstance(result, torch.Tensor if kind == "torch" else np.ndarray), name
                assert as_tensor(result).dtype == wanted.dtype, name
                assert torch.equal(as_tensor(result), wanted), f"{name} on rank {rank}"
        assert await group.call("barrier", str(tmp_path / "late"), world_size - 1) == [True] * world_size
        assert await group.call("repeat", 200) == [world_size * 199 * 100.0] * world_size
        assert set(await group.call("refusal", "list")) == {"a collective got a list; give it a torch tensor or a NumPy array"}
        (read_only,) = set(await group.call("refusal", "bytes"))
        assert read_only.startswith("a collective got a read-only array")


@pytest.mark.parametrize("backend", BACKENDS)
async def test_axes_do_not_mix(backend: str) -> None:
    parallel = zspmd.ParallelConfig(dp=2, tp=2, ep=4)
    async with launch("Collectives", 4, parallel=parallel, communicator=backend, preload=("torch",)) as group:
        for axis, sums in (("tp", [1, 1, 5, 5]), ("dp", [2, 4, 2, 4]), ("ep", [6] * 4), ("world", [6] * 4), ("pp", [0, 1, 2, 3])):
            results = await group.call("collective", "all_reduce", axis, "numpy", "int64", [1], "dense")
            assert [int(result[0]) for result in results] == sums, axis
        assert await group.call("backend", "pp") == ["SoloCommunicator"] * 4


async def test_one_rank_needs_no_backend() -> None:
    async with launch("Collectives", 1) as group:
        assert await group.call("backend", "tp") == ["SoloCommunicator"]
        for operation, kind, dtype, shape, layout in CASES:
            (result,) = await group.call("collective", operation, "tp", kind, dtype, shape, layout)
            wanted = share(0, dtype, shape)
            assert torch.equal(as_tensor(result), wanted.unsqueeze(0) if operation == "all_gather" else wanted)
        assert await group.call("barrier", "/dev/null", 1) == [True]


async def test_the_store_serves_several_threads_of_every_rank() -> None:
    async with launch("StoreUser", 3) as group:
        assert await group.call("exchange", 6) == [[b"%d/%d" % ((rank + 1) % 3, thread) for thread in range(6)] for rank in range(3)]
        counts = [count for counts in await group.call("count", 50) for count in counts]
        assert sorted(counts) == list(range(1, 151))
        for answer in await group.call("absent"):
            assert answer == ["no value for nobody sets this within 0.05 s; another rank has not set it"]
        assert await group.call("exchange", 6)
