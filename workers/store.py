"""The coordinator's store as its users see it: keys and bytes that all ranks of a launch share, and bytes too large for one key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..errors import StoreTimeoutError
from ..transport.records import MAX_STORE_VALUE_BYTES

_LENGTH_BYTES = 8
_PART_BYTES = MAX_STORE_VALUE_BYTES - _LENGTH_BYTES


class Store(Protocol):
    """Keys and bytes, with waiting. ``StoreClient`` and ``TorchStoreAdapter`` are such, and ``PrefixedStore`` makes one of another.

    A value has at most ``MAX_STORE_VALUE_BYTES``; more is a BadFrameError where it is set, or goes through ``set_blob``. ``timeout_s``
    is that of operations that are given none.
    """

    @property
    def timeout_s(self) -> float:
        """Return the seconds that an operation waits unless it is told otherwise."""

    def set(self, key: str, value: bytes) -> None:
        """Store ``value`` under ``key`` and wake whoever waits for it."""

    def get(self, key: str, timeout_s: float | None = None) -> bytes:
        """Return the value of ``key``, waiting for it; raises StoreTimeoutError if it did not appear in time."""

    def get_many(self, keys: Sequence[str], timeout_s: float | None = None) -> list[bytes]:
        """Return the values of ``keys``, waiting for all; raises StoreTimeoutError that names those that did not appear."""

    def wait(self, keys: Sequence[str], timeout_s: float | None = None) -> None:
        """Wait until all ``keys`` are there; raises StoreTimeoutError that names those that are not."""

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all ``keys`` are there now."""

    def add(self, key: str, amount: int) -> int:
        """Add to the decimal number under ``key`` (0 if absent) and return the sum."""

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Set ``key`` if its value is ``expected`` (or it is absent and ``expected`` is empty); return the value it then has."""

    def delete(self, key: str) -> bool:
        """Remove ``key``; whether it was there."""

    def delete_many(self, keys: Sequence[str]) -> int:
        """Remove those of ``keys`` that are there; how many they were."""

    def count(self) -> int:
        """Return how many keys the whole store holds, those outside a prefix included."""


class PrefixedStore:
    """Another store with ``prefix/`` before every key, so that two users never meet by accident."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = f"{prefix}/"

    @property
    def timeout_s(self) -> float:
        return self._store.timeout_s

    def set(self, key: str, value: bytes) -> None:
        self._store.set(self._prefix + key, value)

    def get(self, key: str, timeout_s: float | None = None) -> bytes:
        try:
            return self._store.get(self._prefix + key, timeout_s)
        except StoreTimeoutError as error:
            raise self._without_prefix(error, timeout_s) from None

    def get_many(self, keys: Sequence[str], timeout_s: float | None = None) -> list[bytes]:
        try:
            return self._store.get_many(self._full(keys), timeout_s)
        except StoreTimeoutError as error:
            raise self._without_prefix(error, timeout_s) from None

    def wait(self, keys: Sequence[str], timeout_s: float | None = None) -> None:
        try:
            self._store.wait(self._full(keys), timeout_s)
        except StoreTimeoutError as error:
            raise self._without_prefix(error, timeout_s) from None

    def check(self, keys: Sequence[str]) -> bool:
        return self._store.check(self._full(keys))

    def add(self, key: str, amount: int) -> int:
        return self._store.add(self._prefix + key, amount)

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        return self._store.compare_set(self._prefix + key, expected, desired)

    def delete(self, key: str) -> bool:
        return self._store.delete(self._prefix + key)

    def delete_many(self, keys: Sequence[str]) -> int:
        return self._store.delete_many(self._full(keys))

    def count(self) -> int:
        return self._store.count()

    def _full(self, keys: Sequence[str]) -> list[str]:
        return [self._prefix + key for key in keys]

    def _without_prefix(self, error: StoreTimeoutError, timeout_s: float | None) -> StoreTimeoutError:
        absent = [key[len(self._prefix) :] for key in error.absent]
        return StoreTimeoutError(absent, self.timeout_s if timeout_s is None else timeout_s)


def set_blob(store: Store, key: str, data: bytes) -> list[str]:
    """Store bytes of any length under ``key`` and keys below it; returns all of them, for ``delete_many``.

    The value of ``key`` is the length, u64, and the first part; it is set last, so that who sees it finds the rest.
    """
    keys = _blob_keys(key, len(data))
    for number in reversed(range(1, len(keys))):
        store.set(keys[number], data[number * _PART_BYTES : (number + 1) * _PART_BYTES])
    store.set(key, len(data).to_bytes(_LENGTH_BYTES, "little") + data[:_PART_BYTES])
    return keys


def get_blobs(store: Store, keys: Sequence[str], timeout_s: float | None = None) -> list[bytes]:
    """Return what ``set_blob`` has stored under each of ``keys``, waiting for all; raises StoreTimeoutError that names those missing."""
    blobs = []
    for key, head in zip(keys, store.get_many(keys, timeout_s)):
        length = int.from_bytes(head[:_LENGTH_BYTES], "little")
        rest = _blob_keys(key, length)[1:]
        blobs.append(b"".join([head[_LENGTH_BYTES:], *(store.get_many(rest, timeout_s) if rest else ())]))
    return blobs


def _blob_keys(key: str, length: int) -> list[str]:
    return [key, *(f"{key}/part{number}" for number in range(1, -(-length // _PART_BYTES)))]
