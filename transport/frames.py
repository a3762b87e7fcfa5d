"""The fixed headers of the step and result sockets. docs/protocol.md has the whole picture.

Little endian, no padding:

    step frame     magic "SZ" | version u8 | kind u8 | epoch u32 | seq u64                                      16 B
    result frame   magic "RZ" | version u8 | kind u8 | epoch u32 | seq u64 | rank u16 | reserved u16 | busy_us u32 | received_ns u64   32 B

``seq`` numbers every frame of the step socket from 0 by 1, but a TICK, which carries the number of the last one; a result carries the
``seq`` that it answers. A message is one frame with header and body, and one raw frame for each large tensor. "S" is also the topic
that ranks subscribe to; a frame that is sent again to one rank has that rank's topic in front and is otherwise the same bytes.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import BadFrameError, WireVersionError

if TYPE_CHECKING:
    import zmq

WIRE_VERSION = 6
STEP_MAGIC = b"SZ"
RESULT_MAGIC = b"RZ"
STEP_TOPIC = b"S"
RANK_TOPIC = struct.Struct(">cH")  # its letter and the rank, of fixed width since topics match by prefix
RANK_LETTER = b"T"  # after "S": libzmq announces subscriptions in alphabetical order, and the common one is to come first
STEP_HEADER = struct.Struct("<2sBBIQ")
RESULT_HEADER = struct.Struct("<2sBBIQHHIQ")
MAX_BUFFERS = 1024
_STEP_START = STEP_MAGIC[0]
_STEP_BYTES = STEP_HEADER.size
_RESULT_BYTES = RESULT_HEADER.size
_new = tuple.__new__  # of a NamedTuple, whose own constructor is a Python function in front of it

Buffer = bytes | bytearray | memoryview


class StepKind(enum.IntEnum):
    """What a frame on the step socket asks of every rank."""

    SYNC = 1
    STEP = 2
    CALL = 3
    STOP = 4
    TICK = 5  # nothing, but that ``seq`` was the last frame so far: a rank that lost the end of the stream learns of it


class ResultKind(enum.IntEnum):
    """What a frame on the result socket says."""

    SYNC_ACK = 1
    OUTPUT = 2  # of a step, and its acknowledgement
    ACK = 3  # of a step or call that this rank does not answer
    REPLY = 4  # of a call
    CALL_ERROR = 5  # the called method raised; the rank goes on
    ERROR = 6  # the rank failed and is about to exit
    BYE = 7
    GAP = 8  # the rank has missed frame ``seq``: it and what follows are to be sent again


_STEP_KINDS = {int(kind): kind for kind in StepKind}  # 0.13 us a look-up where calling the enum takes 0.59
_RESULT_KINDS = {int(kind): kind for kind in ResultKind}


class StepFrame(NamedTuple):
    kind: StepKind
    epoch: int
    seq: int
    body: memoryview
    buffers: Sequence[Buffer]


class ResultFrame(NamedTuple):
    """``received_ns``: when the rank had received the step, on its monotonic clock; ``busy_us``: microseconds from there to this answer."""

    kind: ResultKind
    epoch: int
    seq: int
    rank: int
    busy_us: int
    received_ns: int
    body: memoryview
    buffers: Sequence[Buffer]


def rank_topic(rank: int) -> bytes:
    """Return the topic that only this rank subscribes to."""
    return RANK_TOPIC.pack(RANK_LETTER, rank)


def pack_step_header(kind: StepKind, epoch: int, seq: int) -> bytes:
    """Return the 16 header bytes of a step frame."""
    return STEP_HEADER.pack(STEP_MAGIC, WIRE_VERSION, kind, epoch, seq)


def pack_result_header(kind: ResultKind, epoch: int, seq: int, rank: int, busy_us: int, received_ns: int = 0) -> bytes:
    """Return the 32 header bytes of a result frame; ``busy_us`` saturates at u32."""
    return RESULT_HEADER.pack(RESULT_MAGIC, WIRE_VERSION, kind, epoch, seq, rank, 0, min(busy_us, 0xFFFF_FFFF), received_ns)


def parse_step(frames: Sequence[zmq.Frame | bytes]) -> StepFrame:
    """Read a message of the step socket, sent to all or again to one rank.

    Raises:
        BadFrameError: too short, wrong magic, unknown kind or too many buffers.
        WireVersionError: another wire version.
    """
    view = _first(frames)
    if len(view) < _STEP_BYTES:
        raise _too_short(view, _STEP_BYTES)
    if view[0] != _STEP_START:
        view = _without_topic(view)
    magic, version, kind, epoch, seq = STEP_HEADER.unpack_from(view)
    known = _STEP_KINDS.get(kind)
    if magic != STEP_MAGIC or version != WIRE_VERSION or known is None:
        raise _refusal(magic, STEP_MAGIC, version, f"step frame {seq} has kind {kind}; known are 1 to {len(StepKind)}")
    return _new(StepFrame, (known, epoch, seq, view[_STEP_BYTES:], () if len(frames) == 1 else _rest(frames)))


def _without_topic(view: memoryview) -> memoryview:
    """Return what was sent again without the rank's topic, which stands in front."""
    topic = RANK_TOPIC.size
    if view[:1] != RANK_LETTER or view[topic : topic + 2] != STEP_MAGIC:
        raise _bad_magic(bytes(view[:2]), STEP_MAGIC)
    if len(view) < topic + _STEP_BYTES:
        raise _too_short(view[topic:], _STEP_BYTES)
    return view[topic:]


def parse_result(frames: Sequence[zmq.Frame | bytes]) -> ResultFrame:
    """Read a message of the result socket; raises as ``parse_step`` does."""
    view = _first(frames)
    if len(view) < _RESULT_BYTES:
        raise _too_short(view, _RESULT_BYTES)
    magic, version, kind, epoch, seq, rank, _, busy_us, received_ns = RESULT_HEADER.unpack_from(view)
    known = _RESULT_KINDS.get(kind)
    if magic != RESULT_MAGIC or version != WIRE_VERSION or known is None:
        raise _refusal(magic, RESULT_MAGIC, version, f"result frame of rank {rank} has kind {kind}; known are 1 to {len(ResultKind)}")
    return _new(
        ResultFrame, (known, epoch, seq, rank, busy_us, received_ns, view[_RESULT_BYTES:], () if len(frames) == 1 else _rest(frames))
    )


def _first(frames: Sequence[zmq.Frame | bytes]) -> memoryview:
    if not 1 <= len(frames) <= 1 + MAX_BUFFERS:
        raise BadFrameError(f"a message has {len(frames)} frames; the limit is one and {MAX_BUFFERS} tensor buffers")
    first = frames[0]
    return memoryview(first) if isinstance(first, bytes) else first.buffer


def _rest(frames: Sequence[zmq.Frame | bytes]) -> Sequence[Buffer]:
    return [frame_view(frame) for frame in frames[1:]]


def frame_view(frame: zmq.Frame | bytes) -> memoryview:
    return memoryview(frame) if isinstance(frame, bytes) else frame.buffer


def _too_short(view: memoryview, header_bytes: int) -> BadFrameError:
    return BadFrameError(f"a frame has {len(view)} B; its header alone has {header_bytes}")


def _bad_magic(found: bytes, wanted: bytes) -> BadFrameError:
    return BadFrameError(f"a frame begins with {found!r} instead of {wanted!r}")


def _refusal(magic: bytes, wanted: bytes, version: int, bad_kind: str) -> BadFrameError | WireVersionError:
    """Return the first thing that is wrong with a header."""
    if magic != wanted:
        return _bad_magic(magic, wanted)
    if version != WIRE_VERSION:
        return WireVersionError(f"the peer speaks wire version {version}, this side {WIRE_VERSION}; install the same zspmd on both")
    return BadFrameError(bad_kind)
