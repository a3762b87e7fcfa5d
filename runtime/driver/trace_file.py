"""The file of a trace: JSON that is valid after every write, whatever becomes of the launch afterwards."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ... import __version__
from ...errors import ConfigError

_BEGIN = b'{"zspmd_trace": 1, "displayTimeUnit": "ms", "traceEvents": [\n'
_CHUNK = 1000  # events at once


class TraceFile:
    """Events of any number of launches, appended launch by launch; what is known of the launches stands at the end as ``otherData``.

    A file that cannot be written any longer, on a full disk, is left as it was after the last launch, with a line on stderr: a trace
    serves its launch, not the other way round.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._end = len(_BEGIN)  # where the next event goes
        self._is_empty = True
        self._is_open = False
        self._launches: list[dict[str, Any]] = []

    def create(self) -> None:
        """Make the file, without an event; a second call does nothing.

        Raises:
            ConfigError: it cannot be made.
        """
        if self._is_open:
            return
        try:
            with open(self._path, "wb") as file:
                file.write(_BEGIN + self._tail())
        except OSError as error:
            raise ConfigError(f"trace is {self._path!r}, which cannot be made: {error}") from error
        self._is_open = True

    def append(self, events: Iterable[dict[str, Any]], facts: dict[str, Any]) -> None:
        """Add the events of one launch, and what is known of it."""
        if not self._is_open:
            return
        earlier, was_empty = self._end, self._is_empty
        try:
            with open(self._path, "r+b") as file:
                file.seek(self._end)
                iterator = iter(events)
                while chunk := list(itertools.islice(iterator, _CHUNK)):
                    text = ",\n".join(json.dumps(event, separators=(",", ":")) for event in chunk)
                    file.write(("" if self._is_empty else ",\n").encode() + text.encode())
                    self._is_empty = False
                self._end = file.tell()
                self._launches.append(facts)
                file.write(self._tail())
                file.truncate()
        except OSError as error:
            print(f"zspmd: the trace {self._path} ends before {facts['launch_id']}: {error}", file=sys.stderr)
            self._end, self._is_empty, self._is_open = earlier, was_empty, False
            self._restore()

    def _restore(self) -> None:
        """Put the end back where it was; what lies beyond is cut off first, which makes room for it."""
        try:
            with open(self._path, "r+b") as file:
                file.truncate(self._end)
                file.seek(self._end)
                file.write(self._tail())
        except OSError as error:
            print(f"zspmd: the trace {self._path} stays cut: {error}", file=sys.stderr)

    def _tail(self) -> bytes:
        facts = {"producer": f"zspmd {__version__}", "clock": "monotonic, of the driver's node", "launches": self._launches}
        return ("\n],\n" + json.dumps({"otherData": facts}, indent=1)[1:] + "\n").encode()


def check_trace_path(path: str | os.PathLike[str]) -> str:
    """Return where to write a trace, as an absolute path; an earlier trace there is replaced, nothing else is.

    Raises:
        ConfigError: no directory that can be written, or another file is there.
    """
    place = Path(os.path.abspath(path))
    if not os.fspath(path) or place.is_dir():
        raise ConfigError(f"trace is {str(path)!r}; give the path of a file, such as trace.json")
    if not place.parent.is_dir() or not os.access(place.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"trace is {str(path)!r}, but {place.parent} is no directory that can be written; make it first")
    if place.exists() and _first_bytes(place) != _BEGIN:
        raise ConfigError(f"trace is {str(path)!r}, where a file is that is no trace of zspmd; remove it, or choose another name")
    return str(place)


def _first_bytes(path: Path) -> bytes:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(_BEGIN))
    return b""
