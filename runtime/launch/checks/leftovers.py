"""Processes of this user that a launch may have left: there should be none, and doctor looks whether that is so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_SUPERVISORS = ("zspmd-agent", "zspmd-guard")
_MARK = b"ZSPMD_LAUNCH_ID="
_MAX_COMMAND = 60


@dataclass(frozen=True)
class Leftover:
    """A process with the variables of a launch and no agent above it, or an agent that is stopped."""

    pid: int
    launch_id: str
    command: str


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    state: str
    name: str


def find_leftovers() -> list[Leftover]:
    """Return them by pid; what ends meanwhile, belongs to others or cannot be read is passed over."""
    processes = {process.pid: process for process in _processes()}
    own = {os.getpid(), *(process.pid for process in _above(processes, os.getpid()))}
    found = []
    for pid, process in sorted(processes.items()):
        launch_id = _launch_id(pid)
        is_supervised = any(above.name in _SUPERVISORS for above in _above(processes, pid))
        is_stopped = process.name in _SUPERVISORS and process.state in "Tt"
        is_left = launch_id and process.name not in _SUPERVISORS and not is_supervised and process.state != "Z"
        if pid not in own and (is_left or is_stopped):
            found.append(Leftover(pid, launch_id or "?", _command(process)))
    return found


def _processes() -> Iterator[_Process]:
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if entry.stat().st_uid != os.getuid():
                continue
            head, _, tail = (entry / "stat").read_text(errors="replace").rpartition(")")
        except OSError:  # it has ended
            continue
        state, parent, *_ = tail.split()
        yield _Process(int(entry.name), int(parent), state, head.partition("(")[2])


def _above(processes: dict[int, _Process], pid: int) -> Iterator[_Process]:
    """Yield the ancestors of a process that belong to this user too; the number guards against pids used anew while we looked."""
    for _ in range(len(processes)):
        process = processes.get(pid)
        parent = None if process is None else processes.get(process.parent)
        if parent is None:
            return
        yield parent
        pid = parent.pid


def _launch_id(pid: int) -> str:
    try:
        variables = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((value[len(_MARK) :].decode(errors="replace") for value in variables if value.startswith(_MARK)), "")


def _command(process: _Process) -> str:
    try:
        words = (_PROC / str(process.pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        words = ""
    return (words or process.name)[:_MAX_COMMAND]
