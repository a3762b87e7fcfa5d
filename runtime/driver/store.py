"""The coordinator's key-value store at the driver: a state machine without I/O.

Requests go in, replies come out; a get or wait for an absent key is parked until all its keys are there or its own timeout passes. Each
key knows who is parked for it, so that a barrier of n ranks over n keys costs n^2 small steps, not n^3.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...errors import BadFrameError
from ...transport.records import MAX_SEQ, MAX_STORE_VALUE_BYTES, STORE_OPS, StoreReply, StoreRequest

Replies = list[tuple[bytes, StoreReply]]  # (connection, reply)
_WAITING_OPS = ("get", "get_many", "wait")
_ONE_KEY_OPS = ("get", "set", "add", "compare_set")
_VALUE_OVERHEAD_BYTES = 5  # of msgpack, for each value of a list


@dataclass
class _Parked:
    connection: bytes
    request: StoreRequest
    deadline: float
    num_absent: int


@dataclass
class StoreState:
    """Keys and bytes, and who waits for which. ``now`` is any monotonic clock in seconds."""

    values: dict[str, bytes] = field(default_factory=dict)
    _parked: dict[int, _Parked] = field(default_factory=dict)  # by ticket, in the order in which they came
    _parked_on: dict[str, dict[int, _Parked]] = field(default_factory=dict)  # the same, by key
    _tickets: Iterator[int] = field(default_factory=itertools.count)

    def handle(self, connection: bytes, request: StoreRequest, now: float) -> Replies:
        """Do one operation; returns its reply, if it can be given now, and those it sets free.

        Raises:
            BadFrameError: an unknown operation, the wrong number of keys, an add to what is no number or beyond 63 bits.
        """
        if request.op not in STORE_OPS:
            raise BadFrameError(f"store operation {request.op!r}; known are {', '.join(STORE_OPS)}")
        if request.op in _ONE_KEY_OPS and len(request.keys) != 1:
            raise BadFrameError(f"store operation {request.op} with {len(request.keys)} keys; it takes one")
        if request.op in _WAITING_OPS:
            if num_absent := len(set(self._absent(request))):
                self._park(_Parked(connection, request, now + request.timeout_s, num_absent))
                return []
            return [(connection, self._present(request))]
        was_absent = self._absent(request)
        replies = [(connection, self._apply(request))]
        return replies + [reply for key in was_absent if key in self.values for reply in self._release(key)]

    def expire(self, now: float) -> Replies:
        """Return the replies to operations whose timeout has passed; they name the absent keys."""
        late = [ticket for ticket, parked in self._parked.items() if parked.deadline <= now]
        replies = []
        for ticket in late:
            parked = self._unpark(ticket)
            absent = tuple(self._absent(parked.request))
            replies.append((parked.connection, StoreReply(request_id=parked.request.request_id, absent=absent)))
        return replies

    def next_deadline(self) -> float | None:
        """Return when ``expire`` has something to do at the earliest."""
        return min((parked.deadline for parked in self._parked.values()), default=None)

    def _absent(self, request: StoreRequest) -> list[str]:
        return [key for key in request.keys if key not in self.values]

    def _present(self, request: StoreRequest) -> StoreReply:
        if request.op == "get":
            return StoreReply(request_id=request.request_id, value=self.values[request.keys[0]])
        values = self._first_values(request) if request.op == "get_many" else ()
        return StoreReply(request_id=request.request_id, values=values)

    def _first_values(self, request: StoreRequest) -> tuple[bytes, ...]:
        values: list[bytes] = []
        size_bytes = 0
        for key in request.keys:
            size_bytes += len(self.values[key]) + _VALUE_OVERHEAD_BYTES
            if values and size_bytes > MAX_STORE_VALUE_BYTES:
                break
            values.append(self.values[key])
        return tuple(values)

    def _park(self, parked: _Parked) -> None:
        ticket = next(self._tickets)
        self._parked[ticket] = parked
        for key in parked.request.keys:
            self._parked_on.setdefault(key, {})[ticket] = parked

    def _unpark(self, ticket: int) -> _Parked:
        parked = self._parked.pop(ticket)
        for key in set(parked.request.keys):
            del self._parked_on[key][ticket]
            if not self._parked_on[key]:
                del self._parked_on[key]
        return parked

    def _release(self, key: str) -> Replies:
        """Count a key that has appeared for those who wait for it; return the replies to those who have all."""
        ready = []
        for ticket, parked in self._parked_on.get(key, {}).items():
            parked.num_absent -= 1
            if not parked.num_absent:
                ready.append(ticket)
        return [(parked.connection, self._present(parked.request)) for parked in map(self._unpark, ready)]

    def _remove(self, key: str) -> bool:
        was_there = self.values.pop(key, None) is not None
        if was_there:
            for parked in self._parked_on.get(key, {}).values():
                parked.num_absent += 1
        return was_there

    def _apply(self, request: StoreRequest) -> StoreReply:
        values, keys = self.values, request.keys
        value, amount = b"", 0
        if request.op == "check":
            amount = int(not self._absent(request))
        elif request.op == "count":
            amount = len(values)
        elif request.op == "delete":
            amount = sum(map(self._remove, keys))
        elif request.op == "set":
            values[keys[0]] = request.value
        elif request.op == "add":
            amount = _as_number(keys[0], values.get(keys[0], b"0")) + request.amount
            if abs(amount) > MAX_SEQ:
                raise BadFrameError(f"store key {keys[0]!r} would become {amount}; the limit is {MAX_SEQ} either way")
            values[keys[0]] = b"%d" % amount
        else:
            if values.get(keys[0], b"") == request.expected:
                values[keys[0]] = request.value
            value = values.get(keys[0], request.expected)
        return StoreReply(request_id=request.request_id, value=value, amount=amount)


def _as_number(key: str, value: bytes) -> int:
    try:
        return int(value)
    except ValueError:
        raise BadFrameError(f"store key {key!r} holds {value[:32]!r}, which add cannot count with") from None
