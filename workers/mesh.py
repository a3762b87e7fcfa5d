"""``ctx.mesh``: this rank's communicator on each axis, made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..config import ParallelConfig
from ..topology import AXES, AxisGroup, axis_group
from .store import PrefixedStore, Store

if TYPE_CHECKING:
    from .communicators.communicator import Communicator


class Mesh:
    """Maps an axis to the communicator of this rank's group on it.

    Making one is a collective of that group, so every rank must ask for an axis at the same point of its program. Torch is imported
    only then: a worker without collectives never pays for it. ``mesh["tp"].cpu`` is the communicator of the same ranks for CPU tensors.

    Args:
        backend: of an axis whose ranks are on several nodes; ``local_backend`` of one whose ranks share a node, if it is another.
        nodes: the node of each rank; empty where there is one only.
        address: of this node.
    """

    def __init__(
        self,
        parallel: ParallelConfig,
        rank: int,
        *,
        device: str,
        backend: str,
        address: str,
        store: Store,
        timeout_s: float,
        local_backend: str = "",
        nodes: Sequence[int] = (),
    ) -> None:
        self.parallel = parallel
        self._rank = rank
        self._device = device
        self._backend = backend
        self._local_backend = local_backend or backend
        self._nodes = nodes
        self._address = address
        self._store = store
        self._timeout_s = timeout_s
        self._communicators: dict[str, Communicator] = {}
        self.on_created: Callable[[str, Communicator], None] | None = None
        """Is called with an axis and its communicator, before the worker has it."""

    def group(self, axis: str) -> AxisGroup:
        """Return the ranks that share ``axis`` with this one; starts nothing."""
        return axis_group(self.parallel, axis, self._rank)

    def __getitem__(self, axis: str) -> Communicator:
        if axis not in self._communicators:
            communicator = self._communicators[axis] = self._create(axis)
            if self.on_created is not None:
                self.on_created(axis, communicator)
        return self._communicators[axis]

    def __contains__(self, axis: str) -> bool:
        return axis in AXES

    def close(self) -> None:
        """Release every communicator."""
        for communicator in self._communicators.values():
            communicator.close()
        self._communicators.clear()

    def _create(self, axis: str) -> Communicator:
        from .communicators.registry import create_communicator
        from .communicators.setup import CommunicatorSetup

        group = self.group(axis)
        setup = CommunicatorSetup(
            group=group,
            store=PrefixedStore(self._store, f"mesh/{axis}/{group.ranks[0]}"),
            device=self._device,
            address=self._address,
            timeout_s=self._timeout_s,
        )
        is_one_node = len({self._nodes[rank] for rank in group.ranks}) == 1 if self._nodes else True
        return create_communicator(self._local_backend if is_one_node else self._backend, setup)
