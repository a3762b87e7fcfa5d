"""What the factory of a backend is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import CoordinatorTimeoutError, StoreTimeoutError
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

    def meet(self, unique_id: bytes = b"") -> bytes:
        """Wait until every rank of the group is here, and return what the first one brought; once for each setup.

        Args:
            unique_id: what the others need to find the first rank's resources; ignored from the others.

        Raises:
            CoordinatorTimeoutError: ranks that have not come within ``timeout_s``; names them.
        """
        keys = [f"here/{rank}" for rank in self.group.ranks]
        self.store.set(keys[self.group.index], unique_id if self.group.is_first else b"")
        try:
            return self.store.get_many(keys, self.timeout_s)[0]
        except StoreTimeoutError as error:
            absent = [rank for rank, key in zip(self.group.ranks, keys) if key in error.absent]
            raise CoordinatorTimeoutError(f"making the communicator of axis {self.group.axis}", absent, self.timeout_s) from None


Factory = Callable[[CommunicatorSetup], "Communicator"]
