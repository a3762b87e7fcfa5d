"""Frames in pieces, for sockets that take no message above a limit: TCP, where a stranger's first bytes are held before it is known.

A frame travels as parts of ``CHUNK_BYTES`` and one shorter part, which may be empty, at the end: a part of exactly ``CHUNK_BYTES`` is
continued by the next. The rule is the same for every frame of a message, so that frames need no length in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import zmq

from ..errors import BadFrameError
from .frames import Buffer

CHUNK_BYTES = 256 << 10


def split_frame(frame: Buffer) -> Iterator[Buffer]:
    """Yield the parts of one frame; a short one is its own only part."""
    if len(frame) < CHUNK_BYTES:
        yield frame
        return
    view = memoryview(frame)
    for start in range(0, len(view) + 1, CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]


def join_parts(parts: Sequence[zmq.Frame]) -> list[zmq.Frame | bytes]:
    """Return the frames of a message from its parts; those that came in one part are not copied.

    Raises:
        BadFrameError: a part above the limit, or the last one is to be continued.
    """
    if len(parts) == 1 and len(parts[0]) < CHUNK_BYTES:
        return [parts[0]]
    frames: list[zmq.Frame | bytes] = []
    begun: list[memoryview] = []
    for part in parts:
        if len(part) > CHUNK_BYTES:
            raise BadFrameError(f"a part of a frame has {len(part)} B; the limit is {CHUNK_BYTES}")
        if len(part) == CHUNK_BYTES:
            begun.append(part.buffer)
        elif begun:
            frames.append(b"".join([*begun, part.buffer]))
            begun.clear()
        else:
            frames.append(part)
    if begun:
        raise BadFrameError(f"a message ends in a part of {CHUNK_BYTES} B, which another is to continue")
    return frames
