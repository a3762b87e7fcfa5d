"""The coordinator's key-value store at the driver: a state machine without I/O.

Requests go in, replies come out; a get or wait for an absent key is parked until the key appears or its own timeout passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ...errors import BadFrameError
from ...transport.records import MAX_SEQ, STORE_OPS, StoreReply, StoreRequest

Replies = list[tuple[bytes, StoreReply]]  # (connection, reply)


@dataclass
class _Parked:
    connection: bytes
    request: StoreRequest
    deadline: float


@dataclass
class StoreState:
    """Keys and bytes, and who waits for which. ``now`` is any monotonic clock in seconds."""

    values: dict[str, bytes] = field(default_factory=dict)
    _parked: list[_Parked] = field(default_factory=list)

    def handle(self, connection: bytes, request: StoreRequest, now: float) -> Replies:
        """Do one operation; returns its reply, if it can be given now, and those it sets free.

        Raises:
            BadFrameError: an unknown operation, the wrong number of keys, an add to what is no number or beyond 63 bits.
        """
        if request.op not in STORE_OPS:
            raise BadFrameError(f"store operation {request.op!r}; known are {', '.join(STORE_OPS)}")
        if request.op == "get" and len(request.keys) != 1:
            raise BadFrameError(f"store operation get with {len(request.keys)} keys; it takes one")
        if request.op in ("get", "wait"):
            if self._absent(request):
                self._parked.append(_Parked(connection, request, now + request.timeout_s))
                return []
            return [(connection, self._present(request))]
        replies = [(connection, self._apply(request))]
        return replies + self._release() if request.op in ("set", "add", "compare_set") else replies

    def expire(self, now: float) -> Replies:
        """Return the replies to operations whose timeout has passed; they name the absent keys."""
        late = [p for p in self._parked if p.deadline <= now]
        self._parked = [p for p in self._parked if p.deadline > now]
        return [(p.connection, StoreReply(request_id=p.request.request_id, absent=tuple(self._absent(p.request)))) for p in late]

    def next_deadline(self) -> float | None:
        """Return when ``expire`` has something to do at the earliest."""
        return min((p.deadline for p in self._parked), default=None)

    def _absent(self, request: StoreRequest) -> list[str]:
        return [key for key in request.keys if key not in self.values]

    def _present(self, request: StoreRequest) -> StoreReply:
        value = self.values[request.keys[0]] if request.op == "get" else b""
        return StoreReply(request_id=request.request_id, value=value)

    def _release(self) -> Replies:
        ready = [p for p in self._parked if not self._absent(p.request)]
        if ready:
            self._parked = [p for p in self._parked if p not in ready]
        return [(p.connection, self._present(p.request)) for p in ready]

    def _apply(self, request: StoreRequest) -> StoreReply:
        values, keys = self.values, request.keys
        value, amount = b"", 0
        if request.op == "check":
            amount = int(not self._absent(request))
        elif request.op == "count":
            amount = len(values)
        elif len(keys) != 1:
            raise BadFrameError(f"store operation {request.op} with {len(keys)} keys; it takes one")
        elif request.op == "set":
            values[keys[0]] = request.value
        elif request.op == "add":
            amount = _as_number(keys[0], values.get(keys[0], b"0")) + request.amount
            if abs(amount) > MAX_SEQ:
                raise BadFrameError(f"store key {keys[0]!r} would become {amount}; the limit is {MAX_SEQ} either way")
            values[keys[0]] = b"%d" % amount
        elif request.op == "compare_set":
            if values.get(keys[0], b"") == request.expected:
                values[keys[0]] = request.value
            value = values.get(keys[0], request.expected)
        else:
            amount = int(values.pop(keys[0], None) is not None)
        return StoreReply(request_id=request.request_id, value=value, amount=amount)


def _as_number(key: str, value: bytes) -> int:
    try:
        return int(value)
    except ValueError:
        raise BadFrameError(f"store key {key!r} holds {value[:32]!r}, which add cannot count with") from None
