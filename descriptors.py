"""File descriptors that come over a Unix socket."""

from __future__ import annotations

import array
import socket


def receive_fds(channel: socket.socket, max_bytes: int, max_fds: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """Return a message and the descriptors that came with it, none of which a program that is executed inherits.

    ``socket.recv_fds`` of Python 3.11 and before ignores its flags, the one that says so included.
    """
    fds = array.array("i")
    data, ancillary, _, _ = channel.recvmsg(max_bytes, socket.CMSG_SPACE(max_fds * fds.itemsize), flags | socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return data, list(fds)
