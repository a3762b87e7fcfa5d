"""The coordinator of a zspmd launch: data, too, goes through the store at the driver, over the launch's control socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .context import RankFacts
from .coordinator import MAX_DATA_BYTES, Coordinator, Deadline, check_data
from .store import PrefixedStore, Store, get_blobs, set_blob

_torch_stores: set[Any] = set()  # torch's C++ calls them and keeps no Python object alive, even if the program keeps no coordinator


class StoreCoordinator(Coordinator):
    """A ``Coordinator`` over nothing but a ``Store``.

    ``name`` keeps its keys apart from those of the rank's other coordinators; ranks whose coordinators have the same name pair up.
    ``on_close`` releases the store, where it is the coordinator's own.

    A broadcast is acknowledged by a key of each rank that has the data, upon which ``src`` removes all keys of it.
    """

    def __init__(self, facts: RankFacts, store: Store, *, name: str, timeout_s: float, on_close: Callable[[], None] | None = None) -> None:
        super().__init__(facts, PrefixedStore(store, f"coordinator/{name}"), timeout_s=timeout_s)
        self._on_close = on_close
        self._torch_store: Any = None

    def broadcast(self, data: bytes | None, src: int = 0, *, timeout_s: float | None = None) -> bytes:
        deadline = self._deadline(timeout_s)
        kind = self._broadcast_kind(src)
        with deadline.naming_absent(kind):
            if self.rank == src:
                result = self._publish(kind, check_data("broadcast", data, MAX_DATA_BYTES), deadline)
            else:
                (result,) = get_blobs(self.store, [self._key(kind, src)], deadline.left_s())
                self.store.set(self._key(kind, self.rank), b"")
        self._count(kind, [])
        return result

    def all_gather(self, data: bytes, *, timeout_s: float | None = None) -> list[bytes]:
        deadline = self._deadline(timeout_s)
        share = check_data("all_gather", data, MAX_DATA_BYTES // self.world_size)
        self._remove_stale("all_gather")
        keys = set_blob(self.store, self._key("all_gather", self.rank), share)
        with deadline.naming_absent("all_gather"):
            gathered = get_blobs(self.store, [self._key("all_gather", rank) for rank in range(self.world_size)], deadline.left_s())
        self._count("all_gather", keys)
        return gathered

    def torch_store(self) -> Any:
        self._check_open()
        if self._torch_store is None:
            from .torch_store import CoordinatorStore

            self._torch_store = CoordinatorStore(PrefixedStore(self.store, "torch"))
            _torch_stores.add(self._torch_store)
        return self._torch_store

    def close(self) -> None:
        if not self._is_closed and self._on_close is not None:
            self._on_close()
        _torch_stores.discard(self._torch_store)
        super().close()

    def _publish(self, kind: str, data: bytes, deadline: Deadline) -> bytes:
        """Store the data, wait until all others have taken it, and remove every key of it."""
        keys = set_blob(self.store, self._key(kind, self.rank), data)
        taken = [self._key(kind, rank) for rank in range(self.world_size) if rank != self.rank]
        self.store.wait(taken, deadline.left_s())
        self.store.delete_many([*keys, *taken])
        return data
