"""The fixed headers of the step and result sockets. docs/protocol.md has the whole picture.

Little endian, no padding:

    step frame     magic "SZ" | version u8 | kind u8 | epoch u32 | seq u64                                      16 B
    result frame   magic "RZ" | version u8 | kind u8 | epoch u32 | seq u64 | rank u16 | reserved u16 | busy_us u32   24 B

``seq`` numbers every frame of the step socket from 0 by 1; a result carries the ``seq`` that it answers. A message is one frame with
header and body, and one raw frame for each large tensor. "S" is also the topic that ranks subscribe to.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import BadFrameError, WireVersionError

if TYPE_CHECKING:
    import zmq

WIRE_VERSION = 1
STEP_MAGIC = b"SZ"
RESULT_MAGIC = b"RZ"
STEP_TOPIC = b"S"
RANK_TOPIC = struct.Struct(">cH")  # b"R" and the rank, of fixed width since topics match by prefix
STEP_HEADER = struct.Struct("<2sBBIQ")
RESULT_HEADER = struct.Struct("<2sBBIQHHI")
MAX_BUFFERS = 1024

Buffer = bytes | bytearray | memoryview


class StepKind(enum.IntEnum):
    """What a frame on the step socket asks of every rank."""

    SYNC = 1
    STEP = 2
    CALL = 3
    STOP = 4


class ResultKind(enum.IntEnum):
    """What a frame on the result socket says."""

    SYNC_ACK = 1
    OUTPUT = 2  # of a step, and its acknowledgement
    ACK = 3  # of a step or call that this rank does not answer
    REPLY = 4  # of a call
    CALL_ERROR = 5  # the called method raised; the rank goes on
    ERROR = 6  # the rank failed and is about to exit
    BYE = 7


_STEP_KINDS = {int(kind): kind for kind in StepKind}  # 0.13 us a look-up where calling the enum takes 0.59
_RESULT_KINDS = {int(kind): kind for kind in ResultKind}


class StepFrame(NamedTuple):
    kind: StepKind
    epoch: int
    seq: int
    body: memoryview
    buffers: Sequence[Buffer]


class ResultFrame(NamedTuple):
    """``busy_us``: microseconds from the receipt of the step to this answer, as the rank measured them."""

    kind: ResultKind
    epoch: int
    seq: int
    rank: int
    busy_us: int
    body: memoryview
    buffers: Sequence[Buffer]


def rank_topic(rank: int) -> bytes:
    """Return the topic that only this rank subscribes to."""
    return RANK_TOPIC.pack(b"R", rank)


def pack_step_header(kind: StepKind, epoch: int, seq: int) -> bytes:
    """Return the 16 header bytes of a step frame."""
    return STEP_HEADER.pack(STEP_MAGIC, WIRE_VERSION, kind, epoch, seq)


def pack_result_header(kind: ResultKind, epoch: int, seq: int, rank: int, busy_us: int) -> bytes:
    """Return the 24 header bytes of a result frame; ``busy_us`` saturates at u32."""
    return RESULT_HEADER.pack(RESULT_MAGIC, WIRE_VERSION, kind, epoch, seq, rank, 0, min(busy_us, 0xFFFF_FFFF))


def parse_step(frames: Sequence[zmq.Frame | bytes]) -> StepFrame:
    """Read a message of the step socket.

    Raises:
        BadFrameError: too short, wrong magic, unknown kind or too many buffers.
        WireVersionError: another wire version.
    """
    view = _checked(frames, STEP_HEADER.size, STEP_MAGIC)
    _, version, kind, epoch, seq = STEP_HEADER.unpack_from(view)
    _check_version(version)
    known = _STEP_KINDS.get(kind)
    if known is None:
        raise BadFrameError(f"step frame {seq} has kind {kind}; known are 1 to {len(StepKind)}")
    return StepFrame(known, epoch, seq, view[STEP_HEADER.size :], [_view(frame) for frame in frames[1:]])


def parse_result(frames: Sequence[zmq.Frame | bytes]) -> ResultFrame:
    """Read a message of the result socket; raises as ``parse_step`` does."""
    view = _checked(frames, RESULT_HEADER.size, RESULT_MAGIC)
    _, version, kind, epoch, seq, rank, _, busy_us = RESULT_HEADER.unpack_from(view)
    _check_version(version)
    known = _RESULT_KINDS.get(kind)
    if known is None:
        raise BadFrameError(f"result frame of rank {rank} has kind {kind}; known are 1 to {len(ResultKind)}")
    return ResultFrame(known, epoch, seq, rank, busy_us, view[RESULT_HEADER.size :], [_view(frame) for frame in frames[1:]])


def _checked(frames: Sequence[zmq.Frame | bytes], header_bytes: int, magic: bytes) -> memoryview:
    if not 1 <= len(frames) <= 1 + MAX_BUFFERS:
        raise BadFrameError(f"a message has {len(frames)} frames; the limit is one and {MAX_BUFFERS} tensor buffers")
    view = _view(frames[0])
    if len(view) < header_bytes:
        raise BadFrameError(f"a frame has {len(view)} B; its header alone has {header_bytes}")
    if view[:2] != magic:
        raise BadFrameError(f"a frame begins with {bytes(view[:2])!r} instead of {magic!r}")
    return view


def _view(frame: zmq.Frame | bytes) -> memoryview:
    return memoryview(frame) if isinstance(frame, bytes) else frame.buffer


def _check_version(version: int) -> None:
    if version != WIRE_VERSION:
        raise WireVersionError(f"the peer speaks wire version {version}, this side {WIRE_VERSION}; install the same zspmd on both")
