"""From the name of a backend to a communicator: the built-in ones, and those that vendors add by entry points."""

from __future__ import annotations

import importlib
import os
import socket
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ...backends import choose_communicator, vendor_entry_points
from ...errors import ConfigError
from ...topology import AxisGroup
from ..store import PrefixedStore
from .communicator import Communicator
from .setup import CommunicatorSetup, Factory
from .solo import SoloCommunicator

if TYPE_CHECKING:
    from ..coordinator import Coordinator

LOCAL_ADDRESS = "127.0.0.1"
_FACTORIES = {
    "shm": "shared_memory:create_shared_memory",
    "gloo": "process_group:create_gloo",
    "nccl": "process_group:create_nccl",
    "nccl-raw": "nccl_raw:create_nccl_raw",
}
# communicators made by ``create_for_launch``, by launch and rank: what keeps the keys of one from those of the next
_num_created: Counter[tuple[str, int]] = Counter()


def create_communicator(backend: str, setup: CommunicatorSetup) -> Communicator:
    """Return a communicator of the backend; every rank of the group must call this.

    Raises:
        ConfigError: no such backend, a vendor's that cannot be loaded, or a GPU that is not there; nothing was exchanged.
        CoordinatorTimeoutError: another rank did not come in time.
    """
    if setup.group.size == 1:
        return SoloCommunicator(setup.group, device=setup.device)
    _check_device(setup.device)
    communicator = _load_factory(backend)(setup)
    if not isinstance(communicator, Communicator):
        raise ConfigError(f"the factory of communicator {backend!r} returned {communicator!r}, which is no zspmd.Communicator")
    if setup.device != "cpu":
        cpu_setup = replace(setup, device="cpu", store=PrefixedStore(setup.store, "cpu"))
        communicator._create_cpu = lambda: create_communicator("gloo", cpu_setup)
    return communicator


def create_for_launch(coordinator: Coordinator, backend: str, *, device: str | None, timeout_s: float | None) -> Communicator:
    """Do what ``Communicator.create`` says."""
    facts = coordinator.facts
    is_one_node = facts.local_world_size == facts.world_size
    place = facts.device if device is None else device
    if place != "cpu" and ":" not in place:
        raise ConfigError(f"device is {place!r}; say which one, such as '{place}:0'")
    name = choose_communicator(backend, [place], is_one_node=is_one_node)
    number = _num_created[facts.launch_id, facts.rank]
    _num_created[facts.launch_id, facts.rank] += 1
    setup = CommunicatorSetup(
        group=AxisGroup("world", tuple(range(facts.world_size)), facts.rank),
        store=PrefixedStore(coordinator.store, f"communicator/{number}/{name}"),
        device=place,
        address=LOCAL_ADDRESS if is_one_node else _own_address(),
        timeout_s=coordinator.timeout_s if timeout_s is None else timeout_s,
    )
    return create_communicator(name, setup)


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    num_devices = torch.cuda.device_count()
    if kind == "cuda" and int(number) >= num_devices:
        raise ConfigError(f"this rank is to use {device}, but torch {torch.__version__} sees {num_devices} CUDA devices here; use the cpu")


def _load_factory(backend: str) -> Factory:
    if backend in _FACTORIES:
        module, _, name = _FACTORIES[backend].partition(":")
        built_in: Factory = getattr(importlib.import_module(f".{module}", __package__), name)
        return built_in
    vendors = vendor_entry_points()
    if backend not in vendors:
        raise ConfigError(f"this rank has no communicator {backend!r}, only {', '.join([*_FACTORIES, *vendors])}; install it on every node")
    try:
        factory: object = vendors[backend].load()
    except Exception as error:  # whatever a vendor's module raises on import, the user is to see whose it is
        raise ConfigError(f"communicator {backend!r} ({vendors[backend].value}) cannot be loaded: {error}") from error
    if not callable(factory):
        raise ConfigError(f"communicator {backend!r} ({vendors[backend].value}) is {factory!r}, not a function that makes one")
    vendor: Factory = factory
    return vendor


def _own_address() -> str:
    """Return the address at which other nodes reach this one: what its launcher says, or by which it reaches the first; sends nothing."""
    if told := os.environ.get("ZSPMD_NODE_ADDR"):
        return told
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "9"))))
        address: str = probe.getsockname()[0]
    return address
