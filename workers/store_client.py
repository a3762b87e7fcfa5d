"""A rank's client of the coordinator's store: keys and bytes that all ranks of the launch share.

Each thread gets its own connection, so that a thread that waits for a key never keeps another from setting it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import PeerLostError, ProtocolError, StoreTimeoutError
from ..transport.control_sockets import ControlClient
from ..transport.records import MAX_STORE_KEYS, Accepted, Hello, Reject, StoreReply, StoreRequest

REPLY_MARGIN_S = 10.0  # how much longer than its own timeout an operation waits for the driver's word


class StoreClient:
    """A ``Store`` over the control socket.

    Args:
        connect: makes a connection; called by each thread that uses the store.
        hello: what each connection begins with.
        timeout_s: of operations that are given none.
    """

    def __init__(self, connect: Callable[[], ControlClient], hello: Hello, *, timeout_s: float) -> None:
        self._connect = connect
        self._hello = hello
        self.timeout_s = timeout_s
        self._local = threading.local()
        self._request_ids = itertools.count()

    def connect(self) -> None:
        """Connect the calling thread now, not at its first operation.

        A rank does so at its start, when the driver has a descriptor for it for certain: libzmq ends a process that has none left
        at the moment at which somebody connects over ipc.
        """
        self._connection()

    def set(self, key: str, value: bytes) -> None:
        """Store ``value`` under ``key`` and wake whoever waits for it."""
        self._ask("set", [key], value=value)

    def get(self, key: str, timeout_s: float | None = None) -> bytes:
        """Return the value of ``key``, waiting for it.

        Raises:
            StoreTimeoutError: it did not appear in time.
        """
        return self._ask("get", [key], timeout_s=timeout_s).value

    def get_many(self, keys: Sequence[str], timeout_s: float | None = None) -> list[bytes]:
        """Return the values of ``keys``, waiting for all; raises StoreTimeoutError that names those that did not appear.

        It takes one request where the values are small, and one for each half megabyte or so where they are not.
        """
        values: list[bytes] = []
        if len(keys) > MAX_STORE_KEYS:
            self.wait(keys, timeout_s)
        while len(values) < len(keys):
            rest = keys[len(values) : len(values) + MAX_STORE_KEYS]
            values += self._ask("get_many", list(rest), timeout_s=timeout_s).values
        return values

    def wait(self, keys: Sequence[str], timeout_s: float | None = None) -> None:
        """Wait until all ``keys`` are there; raises StoreTimeoutError that names those that are not."""
        deadline = time.monotonic() + self._limit_s(timeout_s)
        absent: list[str] = []
        for some in _slices(keys):
            try:
                self._ask("wait", some, timeout_s=max(0.0, deadline - time.monotonic()))
            except StoreTimeoutError as error:
                absent += error.absent
        if absent:
            raise StoreTimeoutError(absent, self._limit_s(timeout_s))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all ``keys`` are there now."""
        return all(self._ask("check", some).amount for some in _slices(keys))

    def add(self, key: str, amount: int) -> int:
        """Add to the decimal number under ``key`` (0 if absent) and return the sum; raises ValueError if it holds something else."""
        return self._ask("add", [key], amount=amount).amount

    def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Set ``key`` if its value is ``expected`` (or it is absent and ``expected`` is empty); return the value it then has."""
        return self._ask("compare_set", [key], value=desired, expected=expected).value

    def delete(self, key: str) -> bool:
        """Remove ``key``; whether it was there."""
        return bool(self._ask("delete", [key]).amount)

    def delete_many(self, keys: Sequence[str]) -> int:
        """Remove those of ``keys`` that are there; how many they were."""
        return sum(self._ask("delete", some).amount for some in _slices(keys))

    def count(self) -> int:
        """Return how many keys there are."""
        return self._ask("count", []).amount

    def _ask(self, op: str, keys: list[str], *, timeout_s: float | None = None, **fields: Any) -> StoreReply:
        limit = self._limit_s(timeout_s)
        request = StoreRequest(request_id=next(self._request_ids), op=op, keys=tuple(keys), timeout_s=limit, **fields)
        reply = self._exchange(request)
        if reply.error:
            raise ValueError(f"the driver refused it: {reply.error}")
        if reply.absent:
            raise StoreTimeoutError(reply.absent, limit)
        return reply

    def _exchange(self, request: StoreRequest) -> StoreReply:
        """Send a request and wait for its answer."""
        client = self._connection()
        client.send(request)
        while True:
            reply, _ = client.receive(request.timeout_s + REPLY_MARGIN_S)
            if not isinstance(reply, StoreReply):
                raise ProtocolError(f"the store answered {request.op} with a {type(reply).__name__}")
            if reply.request_id == request.request_id:  # an older one belongs to an operation that was given up
                return reply

    def _limit_s(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else timeout_s

    def _connection(self) -> ControlClient:
        client: ControlClient | None = getattr(self._local, "client", None)
        if client is None:
            client = self._connect()
            client.send(self._hello)
            answer, _ = client.receive(self.timeout_s + REPLY_MARGIN_S)
            if isinstance(answer, Reject):
                raise PeerLostError(f"the driver refused a store connection: {answer.reason}")
            if not isinstance(answer, Accepted):
                raise ProtocolError(f"the driver answered a store connection with a {type(answer).__name__}")
            self._local.client = client
        return client


def _slices(keys: Sequence[str]) -> Iterator[list[str]]:
    """Yield the keys in pieces that fit one request."""
    for first in range(0, len(keys), MAX_STORE_KEYS):
        yield list(keys[first : first + MAX_STORE_KEYS])
