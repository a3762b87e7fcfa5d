"""Who has a TCP port of this machine, as far as ``/proc`` tells: what a message about a port that is taken should say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_LISTEN, _TIME_WAIT = "0A", "06"
_MAX_COMMAND = 60


def describe_holder(port: int) -> str:
    """Say who has a port of any address: the process that listens there, or why nobody is to be seen."""
    states = dict(_sockets(port))
    if _LISTEN in states.values():
        inodes = {inode for inode, state in states.items() if state == _LISTEN}
        return _process_with(inodes) or "a process of another user, or in another container, that listens there"
    if _TIME_WAIT in states.values():
        return "a connection that has just ended (TIME_WAIT); within a minute it is free"
    if states:
        return _process_with(set(states)) or "a connection of another user's process"
    return "a process that does not listen yet, such as another launch, or the port is privileged"


def _sockets(port: int) -> Iterator[tuple[str, str]]:
    """Yield inode and state of each socket with this local port in this network; those in TIME_WAIT have the inode 0."""
    for table in ("tcp", "tcp6"):
        try:
            lines = (_PROC / "self/net" / table).read_text().splitlines()[1:]
        except FileNotFoundError:  # without IPv6
            continue
        for line in lines:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9], fields[3]


def _process_with(inodes: set[str]) -> str:
    """Return pid and command of a process that holds one of these sockets; "" where none may be looked at."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and wanted & set(_targets(entry / "fd")):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            return f"pid {entry.name} ({command[:_MAX_COMMAND]})"
    return ""


def _targets(directory: Path) -> Iterator[str]:
    """Yield where the descriptors of a process lead; nothing of one that has ended or is somebody else's."""
    try:
        for name in os.listdir(directory):
            yield os.readlink(directory / name)
    except OSError:
        return
