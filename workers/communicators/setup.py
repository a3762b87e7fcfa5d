"""What the factory of a backend is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...topology import AxisGroup
from ..store import Store

if TYPE_CHECKING:
    from .communicator import Communicator


@dataclass(frozen=True)
class CommunicatorSetup:
    """All that a rank needs to meet the others of its group.

    Attributes:
        group: the ranks, and which of them this is.
        store: keys that only the ranks of this communicator share.
        device: where its tensors are: "cpu" or "cuda:N".
        address: of this node, where the others reach it.
        timeout_s: how long to wait for another rank, at the start and in each collective.
    """

    group: AxisGroup
    store: Store
    device: str
    address: str
    timeout_s: float

    def share_unique_id(self, make: Callable[[], bytes]) -> bytes:
        """Return what ``make`` returned on the first rank of the group, the only one that calls it; once for each setup.

        Raises:
            StoreTimeoutError: the first rank has not made it within ``timeout_s``.
        """
        if not self.group.is_first:
            return self.store.get("unique_id", self.timeout_s)
        unique_id = make()
        self.store.set("unique_id", unique_id)
        return unique_id


Factory = Callable[[CommunicatorSetup], "Communicator"]
