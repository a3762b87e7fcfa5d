"""A driver whose network is its own, over TCP, and cut while steps run: ``python -m support.cut_link SECONDS``.

It prints one line of JSON: how many steps were answered, whether in order, and what ended the group, how long after the cut. Exit code
77 says that this system does not let us have a network of our own.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import os
import socket
import struct
import sys
import time

from support.groups import launch

import zspmd

CANNOT = 77
STEPS_AFTER = 20  # the cut, that show that the group lives
_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_REQUEST = struct.Struct("16sh22x")


def leave_network() -> None:
    """Move this process into a network namespace of its own, which has a loopback interface and nothing else."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _CLONE_NEWNET | (_CLONE_NEWUSER if os.getuid() else 0)
    if libc.unshare(flags):
        print(f"unshare: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(CANNOT)


def set_link(is_up: bool) -> None:
    """Plug in the loopback interface, or pull it: what is sent is lost, and nobody is told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        _, flags = _REQUEST.unpack(fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _REQUEST.pack(b"lo", 0)))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _REQUEST.pack(b"lo", flags | _IFF_UP if is_up else flags & ~_IFF_UP))


async def run(cut_s: float) -> dict[str, object]:
    """Step while the link is cut for ``cut_s``; end after that, or by the error."""
    loop = asyncio.get_running_loop()
    done, is_right, cut_at, ended_at, error = 0, True, 0.0, 0.0, ""
    try:
        async with launch("Counting", bind="127.0.0.1") as group:
            for index in range(50):
                done += await group.step(index) == [[rank, index, index] for rank in range(2)]
            set_link(False)
            cut_at = time.monotonic()
            loop.call_later(cut_s, set_link, True)
            left = STEPS_AFTER
            while left:
                left -= time.monotonic() > cut_at + cut_s
                answers = await group.step(index := index + 1)
                is_right &= answers == [[rank, index, index] for rank in range(2)]
                done += 1
    except zspmd.ZspmdError as caught:
        error = f"{type(caught).__name__}: {caught}"
    ended_at = time.monotonic()
    return {"done": done, "is_right": is_right, "error": error, "after_s": ended_at - cut_at}


if __name__ == "__main__":
    leave_network()
    set_link(True)
    print(json.dumps(asyncio.run(run(float(sys.argv[1])))))
