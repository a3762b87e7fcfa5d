"""The grammar of one host, the same in hostfiles, in lists and in what ``launch(hosts=...)`` is given.

entry := ['^'] [user '@'] host [':' slots] { key '=' value }        blanks around '=' do not matter
host  := name | IPv4 | '[' IPv6 ']' | IPv6, with two colons or more and then no ':' slots | name with ranges, n[01-16,20]
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from ....errors import ConfigError
from .host import Host
from .host_fields import MAX_PORT, MAX_SLOTS, check_python, check_user, read_address, read_devices, read_iface, read_whole, shown
from .host_ranges import expand_ranges

_WORD = re.compile(r"=|[^ \t=]+")
_IN_BRACKETS = re.compile(r"\[([^\[\]]*:[^\[\]]*)\](?::(.*))?", re.DOTALL)
_DIGITS = re.compile(r"[0-9]{1,9}")
_SSH_PORT, _FIRST_USER_PORT = 22, 1024
_MAX_KEY_CHARACTERS = 24

Problem = tuple[int, str]  # column from 1, rule


@dataclass(frozen=True)
class HostEntry:
    """One mention of a host: ``slots`` as it stands there, 0 too; the host itself has none yet."""

    host: Host
    slots: int | None
    line: int
    column: int
    is_excluded: bool = False


def read_entry(text: str, *, line: int, where: str, room: int) -> tuple[list[HostEntry], list[Problem]]:
    """Return the hosts that one entry stands for, in at most ``room`` entries, or everything that is wrong with it."""
    words = [(match[0], match.start() + 1) for match in _WORD.finditer(text)]
    problems: list[Problem] = []
    fields: dict[str, Any] = {"where": where}
    target, column = words[0]
    if target == "=" or (len(words) > 1 and words[1][0] == "="):
        return [], [(column, f"{shown(text.strip())} begins with no host; write the host first, then KEY=VALUE")]
    is_excluded = target.startswith("^")
    names, name_column = _read_target(target[is_excluded:], column + is_excluded, room, fields, problems)
    for key, value, place in _pairs(words, problems):
        with _collecting(problems, place):
            field, read = _find_key(key)
            _set(fields, field, read(value))
    if is_excluded and len(fields) > 1:
        problems.append((column, f"{shown(target)} excludes a host; a user, slots and keys mean nothing there"))
    entries: list[HostEntry] = []
    with _collecting(problems, name_column):
        slots = fields.pop("slots", None)
        if slots is None and "devices" in fields:
            slots = len(fields["devices"])
        entries = [HostEntry(Host(name, **fields), slots, line, column, is_excluded) for name in names]
    return entries, sorted(problems)


@contextlib.contextmanager
def _collecting(problems: list[Problem], column: int) -> Iterator[None]:
    """Make a ConfigError of the body a problem at a column."""
    try:
        yield
    except ConfigError as error:
        problems.append((column, str(error)))


def _read_target(text: str, column: int, room: int, fields: dict[str, Any], problems: list[Problem]) -> tuple[list[str], int]:
    """Return the names before any key, and the column of the first; user and slots go to ``fields``."""
    user, at, rest = text.rpartition("@")
    if "@" in user:
        problems.append((column, f"{shown(text)} has two '@'; write USER@HOST"))
        return [], column
    if at:
        with _collecting(problems, column):
            check_user(user)
            fields["user"] = user
    column += len(user) + len(at)
    name, number = split_number(rest)
    if number is not None:
        with _collecting(problems, column + len(rest) - len(number)):
            fields["slots"] = _read_number(number)
    names: list[str] = []
    with _collecting(problems, column):
        names = expand_ranges(name, room)
    return names, column


def split_number(text: str) -> tuple[str, str | None]:
    """Part the host from the number behind its colon; None where there is no colon, or where colons make it an IPv6 address."""
    if match := _IN_BRACKETS.fullmatch(text):
        return match[1], match[2]
    head, bracket, tail = text.rpartition("]")
    if tail.count(":") > 1:
        return text, None
    name, colon, number = tail.partition(":")
    return head + bracket + name, number if colon else None


def _read_number(text: str) -> int:
    if _DIGITS.fullmatch(text) is None or int(text) > MAX_SLOTS:
        raise ConfigError(f"{shown(f':{text}')} is no number of slots from 0 to {MAX_SLOTS}; write HOST:N, or port=N for the port of ssh")
    number = int(text)
    if number == _SSH_PORT or number >= _FIRST_USER_PORT:
        raise ConfigError(f"':{number}' looks like a port: write port={number}, or slots={number} where slots are meant")
    return number


def _pairs(words: list[tuple[str, int]], problems: list[Problem]) -> Iterator[tuple[str, str, int]]:
    """Yield key, value and column of each key=value after the host, up to the first that is none."""
    index = 1
    while index < len(words):
        key, column = words[index]
        texts = [word for word, _ in words[index + 1 : index + 4]]
        if key == "=" or texts[:1] != ["="]:
            advice = f"write slots={key}" if key.isdecimal() else "after the host comes KEY=VALUE; a comment begins with '#'"
            problems.append((column, f"{shown(key)} is no KEY=VALUE; {advice}"))
            return
        if len(texts) < 2 or "=" in texts[1:]:
            problems.append((column, f"{shown(f'{key}=')} has no value, or one with '=' in it"))
            return
        yield key, texts[1], column
        index += 3


def _set(fields: dict[str, Any], field: str, value: object) -> None:
    if field in fields:
        raise ConfigError(f"{field} is given twice; give it once, also where it is written as HOST:N, USER@HOST or under another key")
    fields[field] = value


def _read_user(text: str) -> str:
    check_user(text)
    return text


def _read_python(text: str) -> str:
    check_python(text)
    return text


_FIELDS: dict[str, Callable[[str], object]] = {
    "slots": partial(read_whole, "slots", low=0, high=MAX_SLOTS),
    "max_slots": partial(read_whole, "max_slots", low=1, high=MAX_SLOTS),
    "user": _read_user,
    "port": partial(read_whole, "port", low=1, high=MAX_PORT),
    "addr": read_address,
    "iface": read_iface,
    "devices": read_devices,
    "python": _read_python,
}
# The other spellings that Open MPI has, with '-' as '_'.
_ALIASES = {
    **dict.fromkeys(("cpu", "count", "np"), "slots"),
    **dict.fromkeys(("slots_max", "max_cpu", "cpu_max", "max_count", "count_max"), "max_slots"),
    **dict.fromkeys(("username", "user_name"), "user"),
}
# What people write who come from elsewhere.
_MEANT = {
    **dict.fromkeys(
        ("gpus", "gpu", "ngpus", "num_gpus", "cpus", "cores", "nproc", "nprocs", "procs", "processes", "ntasks", "tasks", "ppn"), "slots"
    ),
    **dict.fromkeys(("ip", "address", "hostname"), "addr"),
    **dict.fromkeys(("interface", "nic", "dev", "if"), "iface"),
    **dict.fromkeys(("gpu_ids", "cuda", "cuda_visible_devices"), "devices"),
    **dict.fromkeys(("login", "ssh_user"), "user"),
    "ssh_port": "port",
}


def _find_key(key: str) -> tuple[str, Callable[[str], object]]:
    """Return the field that a key means, and how its value is read."""
    name = key.replace("-", "_")
    field = _ALIASES.get(name, name)
    if field in _FIELDS:
        return field, _FIELDS[field]
    near = difflib.get_close_matches(name.lower(), [*_FIELDS, *_ALIASES], 1) if len(name) <= _MAX_KEY_CHARACTERS else []
    meant = _MEANT.get(name.lower()) or (near[0] if near else None)
    advice = f"did you mean {meant}=?" if meant else f"the keys are {', '.join(_FIELDS)}"
    raise ConfigError(f"{shown(f'{key}=')} is no key; {advice}")
