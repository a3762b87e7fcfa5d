"""What ranks agree on outside their collectives: who they are, bytes from one to all and from all to all, and barriers.

It is for set-up, checkpoints and the like, not for the inner loop: each operation is a few requests to the store.

Operations are numbered for each kind, so that ranks pair up by the order of their calls. Each rank puts a key of its own for an
operation, so that whoever waits in vain knows for whom:

    <kind>/<number>/<rank>      the rank's data, or nothing: it is here

A rank that is through operation n knows that everybody has entered it and so is through n - 1; it removes its own key of that one when
it enters n + 1. So each kind leaves two keys a rank, however many operations there were.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import ClosedError, ConfigError, CoordinatorTimeoutError, StoreTimeoutError, TopologyError
from .context import HasRankFacts, RankFacts
from .store import Store

MAX_DATA_BYTES = 64 << 20  # of one broadcast, and of all ranks' shares of an all_gather together: it may lie in the driver's memory
_num_made = 0  # coordinators that from_env has made in this process: the name of the next, the same on every rank
_LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Coordinator(HasRankFacts, ABC):
    """RFC 3587's coordinator, seen from one rank: rank facts, ``broadcast``, ``all_gather``, ``barrier`` and ``local_barrier``.

    All ranks of an operation must call it, in the same order. A rank that does not come within ``timeout_s`` is named in a
    CoordinatorTimeoutError; that operation stays open: call it again with the same arguments to wait on, or give up. A PeerLostError,
    which any operation may raise, is final: whoever serves the store is gone, or a rank went while it moved data.

    Use one coordinator from one thread at a time. A program may make several; every rank then makes them in the same order.

    Attributes:
        facts: rank, world size and the like, also reachable as ``coordinator.rank`` and so on.
        store: keys and bytes that the ranks share, kept apart from those of other coordinators.
        timeout_s: seconds that an operation waits unless it is told otherwise.
    """

    def __init__(self, facts: RankFacts, store: Store, *, timeout_s: float) -> None:
        self.facts = facts
        self.store = store
        self.timeout_s = timeout_s
        self._numbers: dict[str, int] = {}  # how many operations of each kind this rank is through
        self._last: dict[str, list[str]] = {}  # its keys of the last of them, which others may still read
        self._stale: dict[str, list[str]] = {}  # and of the one before, which nobody does
        self._is_closed = False

    @classmethod
    def from_env(cls, *, timeout_s: float = 600.0) -> Coordinator:
        """Return the coordinator of the launch that this process is a rank of.

        Under ``zspmd-run``, and in a ``Worker``, it works over the launch's own control socket; under torchrun, srun and others that
        set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT over a TCPStore and gloo.

        Raises:
            ConfigError: this process is no rank, or the facts in its environment cannot be right; the message says how to start it.
            CoordinatorTimeoutError: under torchrun and others, rank 0 did not come within ``timeout_s``.
        """
        global _num_made
        check_timeout(timeout_s)
        coordinator = _create(str(_num_made), timeout_s)
        _num_made += 1  # one that failed is made again under its name
        return coordinator

    @property
    def is_master(self) -> bool:
        """Whether this is rank 0."""
        return self.facts.rank == 0

    @property
    def is_local_master(self) -> bool:
        """Whether this is the first rank of its node: the one to download what all of them read."""
        return self.facts.local_rank == 0

    @abstractmethod
    def broadcast(self, data: bytes | None, src: int = 0, *, timeout_s: float | None = None) -> bytes:
        """Return rank ``src``'s ``data`` on every rank; on ``src`` once all others have it.

        Args:
            data: at most ``MAX_DATA_BYTES``, on ``src``; not looked at on the others.

        Raises:
            CoordinatorTimeoutError: some ranks did not come within ``timeout_s``; ranks other than ``src`` may need ``src`` only.
            TopologyError: there is no rank ``src``.
            TypeError, ValueError: the data of ``src`` is no bytes, or too large.
            ClosedError: this coordinator was closed.
        """

    @abstractmethod
    def all_gather(self, data: bytes, *, timeout_s: float | None = None) -> list[bytes]:
        """Return every rank's ``data`` in rank order; a rank's share is at most ``MAX_DATA_BYTES / world_size``.

        Raises:
            CoordinatorTimeoutError: some ranks did not come within ``timeout_s``.
            TypeError, ValueError: this rank's data is no bytes, or too large.
            ClosedError: this coordinator was closed.
        """

    @abstractmethod
    def torch_store(self) -> Any:
        """Return the store as a ``torch.distributed.Store``, for ``init_process_group(store=...)`` and ``new_group``.

        It works until the coordinator is closed, and so do groups that use it.

        Raises:
            ClosedError: this coordinator was closed.
        """

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Return once every rank is here.

        Raises:
            CoordinatorTimeoutError: some ranks did not come within ``timeout_s``.
            ClosedError: this coordinator was closed.
        """
        self._meet("barrier", range(self.world_size), self._deadline(timeout_s))

    def local_barrier(self, *, timeout_s: float | None = None) -> None:
        """Return once every rank of this node is here; raises as ``barrier``."""
        first = self.rank - self.local_rank
        self._meet("local_barrier", range(first, first + self.local_world_size), self._deadline(timeout_s))

    def close(self) -> None:
        """Let go of the store; idempotent, and no rank is waited for."""
        self._is_closed = True

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _meet(self, kind: str, ranks: Sequence[int], deadline: Deadline) -> None:
        """Announce this rank for the next operation of ``kind`` and wait until all ``ranks`` have."""
        self._remove_stale(kind)
        key = self._key(kind, self.rank)
        self.store.set(key, b"")
        with deadline.naming_absent(kind):
            self.store.wait([self._key(kind, rank) for rank in ranks], deadline.left_s())
        self._count(kind, [key])

    def _key(self, kind: str, rank: int) -> str:
        return f"{kind}/{self._numbers.get(kind, 0)}/{rank}"

    def _count(self, kind: str, keys: list[str]) -> None:
        """Take note that this rank is through an operation for which it has put ``keys``."""
        self._stale[kind] = self._last.get(kind, [])
        self._last[kind] = keys
        self._numbers[kind] = self._numbers.get(kind, 0) + 1

    def _remove_stale(self, kind: str) -> None:
        if stale := self._stale.pop(kind, []):
            self.store.delete_many(stale)

    def _deadline(self, timeout_s: float | None) -> Deadline:
        self._check_open()
        return Deadline(self.timeout_s if timeout_s is None else check_timeout(timeout_s))

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("this coordinator was closed; Coordinator.from_env() makes another")

    def _broadcast_kind(self, src: int) -> str:
        if isinstance(src, bool) or not isinstance(src, int) or not 0 <= src < self.world_size:
            raise TopologyError(f"src is {src!r}; the ranks are 0 to {self.world_size - 1}")
        return f"broadcast from {src}"


def _create(name: str, timeout_s: float) -> Coordinator:
    from . import bootstrap

    if bootstrap.is_launched():
        from .store_coordinator import StoreCoordinator

        facts = bootstrap.rank_facts()
        store, close = bootstrap.open_store(timeout_s=timeout_s)
        return StoreCoordinator(facts, store, name=name, timeout_s=timeout_s, on_close=close)
    if missing := [name for name in _LAUNCHER_NAMES if not os.environ.get(name)]:
        raise ConfigError(
            f"this process is no rank of a launch: the environment lacks {', '.join(missing)}; "
            "start it with `zspmd-run -n 2 script.py` or torchrun"
        )
    from .torch_coordinator import TorchCoordinator

    return TorchCoordinator.create(name=name, timeout_s=timeout_s)


class Deadline:
    """The moment up to which an operation may wait, and who is to blame once it has passed."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._at = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(0.0, self._at - time.monotonic())

    @contextlib.contextmanager
    def naming_absent(self, operation: str) -> Iterator[None]:
        """Turn a timeout of the store into one that names the ranks, which are the last part of the absent keys."""
        try:
            yield
        except StoreTimeoutError as error:
            absent = sorted(int(key.rpartition("/")[2]) for key in error.absent)
            raise CoordinatorTimeoutError(operation, absent, self.timeout_s) from None


def check_timeout(timeout_s: float) -> float:
    """Return ``timeout_s``; raises ConfigError unless it is a finite number above 0."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < math.inf:
        raise ConfigError(f"timeout_s is {timeout_s!r}; it must be a number of seconds above 0")
    return float(timeout_s)


def check_data(operation: str, data: object, max_bytes: int) -> bytes:
    """Return ``data`` as bytes; raises TypeError or ValueError unless it is bytes, and no more than ``max_bytes`` of them."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"{operation} got a {type(data).__name__}; give it bytes")
    size_bytes = data.nbytes if isinstance(data, memoryview) else len(data)
    if size_bytes > max_bytes:
        raise ValueError(f"{operation} of {size_bytes} B; the limit is {max_bytes} B a rank: give large data to a Communicator or a file")
    return bytes(data)
