"""What ``/proc`` tells of the processes and sockets of one network namespace."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"


def pids_in(namespace: str) -> list[int]:
    """Return the processes in the network namespace at a path; ended ones that nobody has waited for are in none."""
    own = os.stat(namespace).st_ino
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):  # it has ended
                if os.stat(f"/proc/{name}/ns/net").st_ino == own:
                    found.append(int(name))
    return found


def listeners_of(pid: int) -> set[tuple[str, int]]:
    """Return (address, port) of every TCP socket that listens in the network of a process."""
    return {place for place, _ in _listening(pid)}


def own_listeners_of(pid: int) -> set[tuple[str, int]]:
    """Return (address, port) of every TCP socket that a process itself listens on."""
    own = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            own.add(os.readlink(entry))
    return {place for place, inode in _listening(pid) if f"socket:[{inode}]" in own}


def command_of(pid: int) -> str:
    """Return the command line of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def comm_of(pid: int) -> str:
    """Return the name that a process has given itself, such as ``zspmd-rank0``; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def variable_of(pid: int, name: str) -> str:
    """Return a variable that a process was started with; empty when it has none or has ended."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    prefix = f"{name}=".encode()
    return next((entry[len(prefix) :].decode(errors="replace") for entry in entries if entry.startswith(prefix)), "")


def _listening(pid: int) -> Iterator[tuple[tuple[str, int], str]]:
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == _LISTEN:
                address, _, port = local.partition(":")
                yield (_decode(address), int(port, 16)), rest[5]


def _decode(address: str) -> str:
    """Return an address as people write it; the kernel shows its words of four bytes as numbers of this machine."""
    words = [int(address[at : at + 8], 16) for at in range(0, len(address), 8)]
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, struct.pack(f"={len(words)}I", *words))
