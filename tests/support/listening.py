"""TCP sockets of processes, from /proc: where they listen, and what they have accepted."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

_LISTEN = "0A"


def listening(pids: Iterable[int]) -> list[tuple[str, int]]:
    """Return (address, port) of every TCP socket that these processes listen on; addresses as the kernel writes them."""
    inodes = {inode for pid in pids for inode in _socket_inodes(pid)}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == _LISTEN and rest[5] in inodes:
                address, _, port = local.partition(":")
                found.add((address, int(port, 16)))
    return sorted(found)


def accepted(ports: Iterable[int]) -> list[socket.socket]:
    """Return duplicates of the connections that this process has accepted on these ports; they are the caller's to close."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
            if _is_accepted(connection, set(ports)):
                found.append(connection)
            else:
                connection.close()
    return found


def _is_accepted(connection: socket.socket, ports: set[int]) -> bool:
    if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.getsockname()[1] not in ports:
        return False
    try:
        connection.getpeername()
    except OSError:  # it listens
        return False
    return True


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)
        except OSError:  # closed meanwhile
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    return inodes
