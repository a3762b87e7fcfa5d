"""From a name to a communicator: vendors that cannot be loaded, and what ``Communicator.create`` hands to a backend."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributions import install_distribution

from zspmd.errors import ConfigError, CoordinatorTimeoutError, TopologyError
from zspmd.topology import AxisGroup
from zspmd.workers.communicators.communicator import Communicator
from zspmd.workers.communicators.registry import create_communicator
from zspmd.workers.communicators.setup import CommunicatorSetup
from zspmd.workers.communicators.solo import SoloCommunicator
from zspmd.workers.context import RankFacts
from zspmd.workers.store import Store
from zspmd.workers.torch_store import TorchStoreAdapter


def make_store() -> TorchStoreAdapter:
    return TorchStoreAdapter(dist.HashStore(), timeout_s=5.0)  # type: ignore[attr-defined]  # torch's stubs lack it


def setup_of(rank: int, store: Store, *, size: int = 2, device: str = "cpu", timeout_s: float = 5.0) -> CommunicatorSetup:
    group = AxisGroup("tp", tuple(range(size)), rank)
    return CommunicatorSetup(group=group, store=store, device=device, address="127.0.0.1", timeout_s=timeout_s)


@dataclass
class OneRank:
    """As much of a coordinator as ``create`` uses."""

    facts: RankFacts
    store: Store
    timeout_s: float = 5.0


def coordinator_of(world_size: int, local_world_size: int, device: str = "cpu") -> Any:
    facts = RankFacts("launch", 0, world_size, 0, local_world_size, "here", device)
    return OneRank(facts, make_store())


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("acme_absent:create", r"communicator 'acme' \(acme_absent:create\) cannot be loaded: No module named 'acme_absent'"),
        ("acme_module:absent", "cannot be loaded: module 'acme_module' has no attribute 'absent'"),
        ("acme_broken:create", "cannot be loaded: the driver of the device is too old"),
        ("acme_module:NUMBER", r"communicator 'acme' \(acme_module:NUMBER\) is 7, not a function"),
        ("acme_module:nothing", "the factory of communicator 'acme' returned None, which is no zspmd.Communicator"),
    ],
    ids=["no module", "no attribute", "module raises", "no function", "no communicator"],
)
def test_a_vendor_that_cannot_be_used_is_named(target: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_module.py").write_text("NUMBER = 7\ndef nothing(setup): return None\n")
    (tmp_path / "acme_broken.py").write_text("raise RuntimeError('the driver of the device is too old')\n")
    install_distribution(tmp_path, "acme", {"acme": target})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=words):
        create_communicator("acme", setup_of(0, make_store()))


def test_a_backend_that_only_the_driver_has_is_named() -> None:
    with pytest.raises(ConfigError, match="this rank has no communicator 'acme', only shm, gloo, nccl, nccl-raw; install it on every node"):
        create_communicator("acme", setup_of(0, make_store()))


def test_one_rank_needs_no_backend() -> None:
    communicator = create_communicator("acme", setup_of(0, make_store(), size=1))
    assert type(communicator) is SoloCommunicator
    assert communicator.cpu is communicator


def test_ranks_that_meet_learn_what_the_first_brought() -> None:
    store = make_store()
    store.set("here/1", b"")
    assert setup_of(0, store).meet(b"id of 0") == b"id of 0"
    assert setup_of(1, store).meet(b"id of 1") == b"id of 0"


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize(("rank", "absent"), [(0, (1, 2)), (1, (0, 2))], ids=["first", "second"])
def test_ranks_that_do_not_come_are_named(backend: str, rank: int, absent: tuple[int, ...]) -> None:
    told = rf"axis tp: ranks {absent[0]}, {absent[1]} have not come within 0\.05 s"
    with pytest.raises(CoordinatorTimeoutError, match=told) as late:
        create_communicator(backend, setup_of(rank, make_store(), size=3, timeout_s=0.05))
    assert late.value.absent == absent


@pytest.mark.parametrize("backend", ["nccl", "nccl-raw", "acme"])
def test_a_gpu_that_is_not_there_is_told_before_ranks_meet(backend: str) -> None:
    store = make_store()
    num_devices = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"this rank is to use cuda:{num_devices}, but .* sees {num_devices} CUDA devices here"):
        create_communicator(backend, setup_of(0, store, device=f"cuda:{num_devices}"))
    assert not store.check(["here/0"])


def test_ranks_that_ask_for_different_backends_do_not_meet() -> None:
    store = make_store()
    for rank, backend in enumerate(["gloo", "shm"]):
        coordinator: Any = OneRank(RankFacts("two minds", rank, 2, rank, 2, "here", "cpu"), store)
        with pytest.raises(CoordinatorTimeoutError, match=f"axis world: rank {1 - rank} has not come"):
            Communicator.create(coordinator, backend, timeout_s=0.05)


def test_create_makes_a_communicator_over_the_launch() -> None:
    with Communicator.create(coordinator_of(1, 1)) as communicator:
        assert (communicator.ranks, communicator.rank, communicator.group.axis) == ((0,), 0, "world")
        assert communicator.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("backend", "device", "error", "words"),
    [
        ("mpi", None, ConfigError, "communicator is 'mpi'; choose one of auto, shm, gloo, nccl, nccl-raw"),
        ("nccl", None, TopologyError, "'nccl' does not serve 'cpu'"),
        ("gloo", "cuda:0", TopologyError, "'gloo' does not serve 'cuda:0'"),
        ("auto", "cuda", ConfigError, "device is 'cuda'; say which one, such as 'cuda:0'"),
        ("shm", None, TopologyError, "'shm' serves the ranks of one node only; use gloo"),
    ],
    ids=["unknown", "nccl on a cpu", "gloo on a gpu", "no number", "shm on two nodes"],
)
def test_create_refuses_what_does_not_fit(backend: str, device: str | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Communicator.create(coordinator_of(4, 2), backend, device=device)
