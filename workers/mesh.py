"""``ctx.mesh``: this rank's communicator on each axis, made when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import ParallelConfig
from ..topology import AXES, AxisGroup, axis_group

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from .communicators.communicator import Communicator
    from .store_client import StoreClient
    from .torch_store import CoordinatorStore


class Mesh:
    """Maps an axis to the communicator of this rank's group on it.

    Making one is a collective of that group, so every rank must ask for an axis at the same point of its program. Torch is imported
    only then: a worker without collectives never pays for it.
    """

    def __init__(
        self,
        parallel: ParallelConfig,
        rank: int,
        *,
        device: str,
        backend: str,
        address: str,
        store: StoreClient,
        timeout_s: float,
    ) -> None:
        self.parallel = parallel
        self._rank = rank
        self._device = device
        self._backend = backend
        self._address = address
        self._store = store
        self._timeout_s = timeout_s
        self._communicators: dict[str, Communicator] = {}
        self._torch_store: CoordinatorStore | None = None  # process groups need the Python object alive

    def group(self, axis: str) -> AxisGroup:
        """Return the ranks that share ``axis`` with this one; starts nothing."""
        return axis_group(self.parallel, axis, self._rank)

    def __getitem__(self, axis: str) -> Communicator:
        if axis not in self._communicators:
            self._communicators[axis] = self._create(axis)
        return self._communicators[axis]

    def __contains__(self, axis: str) -> bool:
        return axis in AXES

    def close(self) -> None:
        """Release every communicator."""
        for communicator in self._communicators.values():
            communicator.close()
        self._communicators.clear()

    def _create(self, axis: str) -> Communicator:
        from .communicators import communicator, process_group, shared_memory

        group = self.group(axis)
        if group.size == 1:
            return communicator.SoloCommunicator(group)
        if self._backend == "shm":
            return shared_memory.create_shared_memory(group, self._store, timeout_s=self._timeout_s)
        store = self._rendezvous(f"mesh/{axis}/{group.ranks[0]}")
        if self._backend == "nccl":
            return process_group.create_nccl(group, store, device=self._device, timeout_s=self._timeout_s)
        return process_group.create_gloo(group, store, address=self._address, timeout_s=self._timeout_s)

    def _rendezvous(self, prefix: str) -> Store:
        """Return the launch's store under a prefix, as torch wants it."""
        from torch.distributed.distributed_c10d import PrefixStore

        from .torch_store import CoordinatorStore

        if self._torch_store is None:
            self._torch_store = CoordinatorStore(self._store)
        return PrefixStore(prefix, self._torch_store)
