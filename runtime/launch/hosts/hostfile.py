"""Reading a hostfile: one grammar for what Open MPI, MPICH, DeepSpeed and batch systems write; ``docs/hostfile.md`` describes it."""

from __future__ import annotations

import os
import re
import sys

from ....errors import HostfileError
from .host import Host
from .host_collector import HostCollector

MAX_FILE_BYTES = 1 << 20
_STDIN = "<stdin>"
_COMMENT = re.compile(r"(?:^|(?<=[ \t]))(?:#|//)")
_BLANKS = " \t\r"


def read_hostfile(path: str | os.PathLike[str], notes: list[str] | None = None) -> list[Host]:
    """Return the hosts of a file, in its order; "-" is standard input.

    Args:
        notes: gets a line of text for each thing that was done and may surprise: a host left out, repeats that were counted.

    Raises:
        HostfileError: the file is missing, empty, a directory, larger than 1 MiB or not UTF-8, or lines of it break a rule: all of them.
    """
    name = os.fspath(path)
    return parse_hostfile(read_host_text(name), _STDIN if name == "-" else name, notes)


def parse_hostfile(text: str, path: str, notes: list[str] | None = None) -> list[Host]:
    """Return the hosts in a hostfile's text; ``path`` is its name in messages. Otherwise as ``read_hostfile``."""
    collector = HostCollector(path)
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if entry := cut_comment(line):
            collector.add(entry, number)
    return collector.finish(notes)


def cut_comment(line: str) -> str:
    """Return a line without its comment and the blanks behind; empty where nothing else is on it."""
    comment = _COMMENT.search(line)
    return (line[: comment.start()] if comment else line).rstrip(_BLANKS)


def read_host_text(path: str, label: str | None = None) -> str:
    """Return the text of a file of hosts; ``label`` is its name in messages, by default its path.

    Raises:
        HostfileError: it cannot be read or is not UTF-8.
    """
    label = label or (_STDIN if path == "-" else path)
    try:
        data = _read_stdin() if path == "-" else _read_file(path)
    except IsADirectoryError as error:
        raise HostfileError([(0, 0, "it is a directory; name a file")], path=label) from error
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise HostfileError([(0, 0, f"it cannot be read: {reason}; give the path of a hostfile")], path=label) from error
    if len(data) > MAX_FILE_BYTES:
        raise HostfileError([(0, 0, f"it is larger than {MAX_FILE_BYTES} bytes, which no hostfile is; name another file")], path=label)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode().removeprefix("\ufeff")
        column = len(before) - before.rfind("\n")
        rule = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 text"
        raise HostfileError([(before.count("\n") + 1, column, rule)], path=label) from error


def _read_file(path: str) -> bytes:
    with open(path, "rb", opener=_open_at_once) as file:
        return file.read(MAX_FILE_BYTES + 1)


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a named pipe that nobody writes, which would block for ever, reads as empty."""
    fd = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(fd, True)
    return fd


def _read_stdin() -> bytes:
    if sys.stdin is None:
        raise OSError(None, "standard input is closed")
    return sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
