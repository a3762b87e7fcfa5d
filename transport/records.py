"""The control records: what ranks and driver say outside the step stream. ``schema`` checks them."""

from __future__ import annotations

from dataclasses import dataclass

from .frames import Buffer
from .schema import Record, blob, flag, many, number, read_record, text, whole
from .security import RankKeys, needs_keys

MAX_RECORD_BYTES = 1 << 20


class ControlRecord(Record, max_bytes=MAX_RECORD_BYTES):
    """Base of the records of the control socket, of bootstraps and of failures."""


def unpack_record(data: Buffer) -> ControlRecord:
    """Read any control record; raises BadFrameError as ``read_record`` does."""
    return read_record(ControlRecord, data)


MAX_RANK = (1 << 16) - 1
MAX_SEQ = (1 << 63) - 1


@dataclass(frozen=True)
class Bootstrap(ControlRecord):
    """What a rank reads from its inherited fd: where the driver is, and the secrets that open the door.

    Over TCP these are the rank's CURVE pair and the driver's public key, in Z85; they are empty within a host.
    """

    launch_id: str = text(64)
    control_endpoint: str = text(512)
    token: bytes = blob(64, repr=False)
    public_key: bytes = blob(40, default=b"", repr=False)
    secret_key: bytes = blob(40, default=b"", repr=False)
    server_key: bytes = blob(40, default=b"", repr=False)

    @property
    def keys(self) -> RankKeys | None:
        """The keys that TCP needs; None for a launch within its host. Raises InsecureEndpointError for some that are none."""
        if not needs_keys(self.control_endpoint):
            return None
        return RankKeys(self.public_key, self.secret_key, self.server_key)


@dataclass(frozen=True)
class Hello(ControlRecord):
    """First record on each control connection of a rank; ``purpose`` is rank, beat, store or trace."""

    token: bytes = blob(64, repr=False)
    rank: int = whole(MAX_RANK)
    pid: int = whole(1 << 31)
    host: str = text(256)
    version: str = text(64)
    purpose: str = text(16)


MAX_TRACE_EVENTS = 1 << 24
MAX_TRACE_BYTES = MAX_RECORD_BYTES // 4


@dataclass(frozen=True)
class Welcome(ControlRecord):
    """The answer to a rank's hello. The worker's arguments follow as codec body and buffers.

    ``recording`` is that of the launch, beside which each rank writes its collectives; empty for none. ``nodes`` has the node of each
    rank; an axis whose ranks share one has ``local_communicator``, others ``communicator``. ``is_relayed``: ``step_endpoint`` is that of
    the node's relay, whose frames come in parts. ``trace_events``: how many the rank keeps for the launch's trace, 0 for none; in the
    file ``trace_path`` in the driver's memory, or, where it shares none with the driver, in memory, from which it sends ``TraceEvents``.
    """

    epoch: int = whole((1 << 32) - 1)
    step_endpoint: str = text(512)
    result_endpoint: str = text(512)
    worker: str = text(1024)
    main_path: str = text(4096)
    output_ranks: tuple[int, ...] = many(int, MAX_RANK + 1)
    tp: int = whole(MAX_RANK + 1, 1)
    pp: int = whole(MAX_RANK + 1, 1)
    dp: int = whole(MAX_RANK + 1, 1)
    ep: int = whole(MAX_RANK + 1, 1)
    device: str = text(64)
    communicator: str = text(64)
    beat_s: float = number()
    collective_s: float = number()
    recording: str = text(4096, default="")
    local_communicator: str = text(64, default="")
    nodes: tuple[int, ...] = many(int, MAX_RANK + 1, default=())
    is_relayed: bool = flag(default=False)
    trace_events: int = whole(MAX_TRACE_EVENTS, default=0)
    trace_path: str = text(4096, default="")


@dataclass(frozen=True)
class TraceEvents(ControlRecord):
    """What a rank of another node did since the last one: records of its ``TraceBuffer`` from number ``first`` on.

    ``filled`` are earlier ones that have been completed, with their numbers, a u64 each; ``names`` are new ones, in order. The one with
    ``is_closed`` is the rank's last and is answered with ``Accepted``.
    """

    first: int = whole(MAX_SEQ)
    rows: bytes = blob(MAX_TRACE_BYTES)
    filled_numbers: bytes = blob(MAX_TRACE_BYTES)
    filled: bytes = blob(MAX_TRACE_BYTES)
    names: tuple[str, ...] = many(str, 1 << 16)
    num_unnamed: int = whole(MAX_SEQ, default=0)
    is_closed: bool = flag(default=False)


@dataclass(frozen=True)
class Accepted(ControlRecord):
    """The answer to the hello of a store connection, and to a rank's last ``TraceEvents``; a beat connection gets none."""


@dataclass(frozen=True)
class Reject(ControlRecord):
    """The driver will not take this connection."""

    reason: str = text(4096)


@dataclass(frozen=True)
class Beat(ControlRecord):
    """A rank's sign of life; ``phase`` is setup, idle, step, call or teardown, ``seq`` the frame it started last (-1 none).

    ``foreign_frames`` and ``duplicate_frames`` were dropped, ``gaps`` were asked for again.
    """

    phase: str = text(32)
    seq: int = whole(MAX_SEQ, -1)
    done_seq: int = whole(MAX_SEQ, -1)
    step_id: int = whole(MAX_SEQ, -1)
    memory_bytes: int = whole(MAX_SEQ)
    done_step_id: int = whole(MAX_SEQ, -1, default=-1)
    foreign_frames: int = whole(MAX_SEQ, default=0)
    duplicate_frames: int = whole(MAX_SEQ, default=0)
    gaps: int = whole(MAX_SEQ, default=0)


@dataclass(frozen=True)
class Progress(ControlRecord):
    """How far a rank's set-up is, for whoever watches."""

    done: int = whole(MAX_SEQ)
    total: int = whole(MAX_SEQ)
    what: str = text(256)


STORE_OPS = ("set", "get", "wait", "check", "add", "compare_set", "delete", "count", "get_many")
MAX_STORE_KEYS = 4096  # of one operation
MAX_STORE_VALUE_BYTES = MAX_RECORD_BYTES // 2


@dataclass(frozen=True)
class StoreRequest(ControlRecord):
    """One operation on the coordinator's store; ``op`` is one of ``STORE_OPS``."""

    request_id: int = whole(MAX_SEQ)
    op: str = text(16)
    keys: tuple[str, ...] = many(str, MAX_STORE_KEYS)
    value: bytes = blob(MAX_STORE_VALUE_BYTES, default=b"")
    expected: bytes = blob(MAX_STORE_VALUE_BYTES, default=b"")
    amount: int = whole(MAX_SEQ, -MAX_SEQ, default=0)
    timeout_s: float = number(default=0.0)


@dataclass(frozen=True)
class StoreReply(ControlRecord):
    """``absent`` lists the keys that a get or wait did not see in time; ``error`` says why a request was refused. Else both are empty.

    ``values`` answers get_many: those of its first keys, one at least and no more than ``MAX_STORE_VALUE_BYTES`` together; the rest
    is asked for again.
    """

    request_id: int = whole(MAX_SEQ)
    value: bytes = blob(MAX_STORE_VALUE_BYTES, default=b"")
    values: tuple[bytes, ...] = many(bytes, MAX_STORE_KEYS, default=())
    amount: int = whole(MAX_SEQ, -MAX_SEQ, default=0)
    absent: tuple[str, ...] = many(str, MAX_STORE_KEYS, default=())
    error: str = text(4096, default="")


@dataclass(frozen=True)
class Failure(ControlRecord):
    """Why a rank gives up, or why a call raised; the body of an ERROR or CALL_ERROR frame."""

    exception_type: str = text(512)
    message: str = text(65_536)
    traceback: str = text(262_144)
    phase: str = text(32)
    step_id: int = whole(MAX_SEQ, -1)
