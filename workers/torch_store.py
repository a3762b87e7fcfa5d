"""The coordinator's store as a ``torch.distributed.Store``, so that process groups meet without a TCP port of torch's."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from .store_client import StoreClient


class CoordinatorStore(dist.Store):  # type: ignore[misc, name-defined]  # torch's stubs do not export it
    """Hands torch's store operations to a ``StoreClient``. Keep a reference for as long as a process group uses it."""

    def __init__(self, client: StoreClient) -> None:
        super().__init__()
        self._client = client
        self._timeout_s = client.timeout_s

    @property
    def timeout(self) -> timedelta:
        return timedelta(seconds=self._timeout_s)

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def set(self, key: str, value: str | bytes) -> None:
        self._client.set(key, value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        return self._client.get(key, self._timeout_s)

    def add(self, key: str, amount: int) -> int:
        return self._client.add(key, amount)

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        expected = expected_value.encode() if isinstance(expected_value, str) else bytes(expected_value)
        desired = desired_value.encode() if isinstance(desired_value, str) else bytes(desired_value)
        return self._client.compare_set(key, expected, desired)

    def check(self, keys: Sequence[str]) -> bool:
        return self._client.check(keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._client.wait(keys, self._timeout_s if timeout is None else timeout.total_seconds())

    def delete_key(self, key: str) -> bool:
        return self._client.delete(key)

    def num_keys(self) -> int:
        return self._client.count()

    # the names by which torch's C++ calls the two
    deleteKey = delete_key
    getNumKeys = num_keys
