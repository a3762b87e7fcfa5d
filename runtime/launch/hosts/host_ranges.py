"""Names with numbers in brackets, as Slurm writes them: ``n[01-03,7]`` is n01, n02, n03 and n07."""

from __future__ import annotations

import itertools
import math
import re

from ....errors import ConfigError
from .host_fields import shown

_GROUP = re.compile(r"\[([^\[\]]*)\]")
_MAX_GROUPS = 4
_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def expand_ranges(text: str, room: int) -> list[str]:
    """Return the names that ``text`` stands for, the last bracket varying fastest; a text without brackets stands for itself.

    A number is padded with zeros to the width of its range's first one, where that begins with a zero.

    Raises:
        ConfigError: brackets that do not pair, something else than numbers in them, a name twice, or more names than ``room``.
    """
    parts = _GROUP.split(text)
    fixed, groups = parts[0::2], parts[1::2]
    if any("[" in part or "]" in part for part in fixed):
        raise ConfigError(f"{shown(text)}: a bracket has no partner; write a range as n[1-4], an IPv6 address as [2001:db8::1]")
    if len(groups) > _MAX_GROUPS:
        raise ConfigError(f"{shown(text)} has {len(groups)} ranges; {_MAX_GROUPS} are accepted in one name")
    ranges = [_read_ranges(group) for group in groups]
    count = math.prod(sum(last - first + 1 for first, last, _ in group) for group in ranges)
    if count > room:
        raise ConfigError(f"{shown(text)} stands for {count} hosts, and {room} more are accepted")
    if not groups:
        return [text]
    names = ["".join(itertools.chain.from_iterable(zip(fixed, (*place, "")))) for place in itertools.product(*map(_numbers, ranges))]
    if len(set(names)) < len(names):
        raise ConfigError(f"{shown(text)} stands for a name twice; ranges in one bracket must not overlap")
    return names


def _read_ranges(group: str) -> list[tuple[int, int, int]]:
    """Return first, last and width of each range of a bracket."""
    ranges = []
    for part in group.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise ConfigError(f"{shown(f'[{group}]')} is no range: {shown(part)} is neither a number nor two of them with '-' between")
        first, last = match[1], match[2] or match[1]
        if int(first) > int(last):
            raise ConfigError(f"{shown(f'[{group}]')} runs backwards: {first} is more than {last}")
        ranges.append((int(first), int(last), len(first) if first.startswith("0") else 0))
    return ranges


def _numbers(ranges: list[tuple[int, int, int]]) -> list[str]:
    return [str(number).zfill(width) for first, last, width in ranges for number in range(first, last + 1)]
