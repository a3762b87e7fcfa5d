"""Between our ``Store`` and ``torch.distributed.Store``, in both directions.

``CoordinatorStore`` lets torch's process groups meet in the launch's store, without a TCP port of torch's. ``TorchStoreAdapter`` makes a
``Store`` of torch's, for programs that another launcher started.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..errors import BadFrameError, PeerLostError, StoreTimeoutError
from ..transport.records import MAX_STORE_VALUE_BYTES
from .store import Store

_WAIT_SLICE_S = 1.0  # torch's wait sees neither Ctrl-C nor this store's other threads before it returns


class CoordinatorStore(dist.Store):  # type: ignore[misc, name-defined]  # torch's stubs do not export it
    """Hands torch's store operations to a ``Store``. Keep a reference for as long as a process group uses it.

    A timeout is a ``DistStoreError`` here, as torch's own code expects.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store
        self._timeout_s = store.timeout_s

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._timeout_s)

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def set(self, key: str, value: str | bytes) -> None:
        self._store.set(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        with _as_torch_error():
            return self._store.get(key, self._timeout_s)

    def add(self, key: str, amount: int) -> int:
        return self._store.add(key, amount)

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        expected = expected_value.encode() if isinstance(expected_value, str) else bytes(expected_value)
        desired = desired_value.encode() if isinstance(desired_value, str) else bytes(desired_value)
        return self._store.compare_set(key, expected, desired)

    def check(self, keys: Sequence[str]) -> bool:
        return self._store.check(keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        with _as_torch_error():
            self._store.wait(keys, self._timeout_s if timeout is None else timeout.total_seconds())

    def delete_key(self, key: str) -> bool:
        return self._store.delete(key)

    def num_keys(self) -> int:
        return self._store.count()

    # the names by which torch's C++ calls the two
    deleteKey = delete_key
    getNumKeys = num_keys


class TorchStoreAdapter:
    """A ``Store`` over a ``torch.distributed.Store``.

    Torch's TCPStore has one connection: a thread that waits here may hold up another's operation for a second. An ``add`` to what is no
    number ends it, and is a PeerLostError.
    """

    def __init__(self, store: Any, *, timeout_s: float) -> None:
        self._store = store
        self.timeout_s = timeout_s

    def set(self, key: str, value: bytes) -> None:
        if len(value) > MAX_STORE_VALUE_BYTES:
            raise BadFrameError(f"the value of store key {key!r} has length {len(value)}; the limit is {MAX_STORE_VALUE_BYTES}")
        with _as_our_error():
            self._store.set(key, value)

    def get(self, key: str, timeout_s: float | None = None) -> bytes:
        return self.get_many([key], timeout_s)[0]

    def get_many(self, keys: Sequence[str], timeout_s: float | None = None) -> list[bytes]:
        self.wait(keys, timeout_s)
        with _as_our_error():
            if self._store.has_extended_api():
                return [bytes(value) for value in self._store.multi_get(list(keys))] if keys else []
            return [bytes(self._store.get(key)) for key in keys]

    def wait(self, keys: Sequence[str], timeout_s: float | None = None) -> None:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + limit_s
        while not self._wait_slice(keys, min(_WAIT_SLICE_S, deadline - time.monotonic())):
            if time.monotonic() >= deadline and (absent := [key for key in keys if not self.check([key])]):
                raise StoreTimeoutError(absent, limit_s)

    def check(self, keys: Sequence[str]) -> bool:
        with _as_our_error():
            return bool(self._store.check(list(keys)))

    def add(self, key: str, amount: int) -> int:
        with _as_our_error():
            return int(self._store.add(key, amount))

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        with _as_our_error():
            return bytes(self._store.compare_set(key, expected, desired))

    def delete(self, key: str) -> bool:
        with _as_our_error():
            return bool(self._store.delete_key(key))

    def delete_many(self, keys: Sequence[str]) -> int:
        return sum(map(self.delete, keys))

    def count(self) -> int:
        with _as_our_error():
            return int(self._store.num_keys())

    def _wait_slice(self, keys: Sequence[str], slice_s: float) -> bool:
        """Wait a little; whether all keys are there."""
        if self.check(keys):
            return True
        try:
            with _as_our_error():
                self._store.wait(list(keys), timedelta(seconds=max(0.001, slice_s)))  # 0 would be for ever
        except TimeoutError:
            return False
        return True


@contextmanager
def _as_torch_error() -> Iterator[None]:
    try:
        yield
    except StoreTimeoutError as error:
        raise dist.DistStoreError(str(error)) from error


@contextmanager
def _as_our_error() -> Iterator[None]:
    """Turn torch's errors into TimeoutError and PeerLostError."""
    try:
        yield
    except dist.DistStoreError as error:
        raise TimeoutError(str(error)) from error
    except dist.DistError as error:
        raise PeerLostError(f"torch's store is gone: {error}; has rank 0 or the launcher ended?") from error
