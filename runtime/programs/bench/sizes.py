"""Sizes in bytes as options have them and tables show them: 64, 512, 64K, 1M."""

from __future__ import annotations

import argparse

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
MAX_SIZE = 256 << 20


def read_size(text: str) -> int:
    """Return the bytes that an option's text stands for; a ``type=`` for argparse."""
    number, unit = text.removesuffix("B"), ""
    if number[-1:].upper() in ("K", "M"):
        number, unit = number[:-1], number[-1].upper()
    if not number.isdecimal() or not 0 < int(number) * _UNITS[unit] <= MAX_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is no size from 1 B to 256 MB; write it as 512, 64K or 1M")
    return int(number) * _UNITS[unit]


def show_size(size: int) -> str:
    """Return a size as people read it."""
    for unit in ("M", "K"):
        if size >= _UNITS[unit] and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]} {unit}B"
    return f"{size} B"
