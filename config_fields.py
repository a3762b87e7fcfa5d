"""Typed reads from the JSON object of a file that somebody else wrote: each field is checked, and an error shows its value."""

from __future__ import annotations

import reprlib
import sys

from .errors import CheckpointError

_shortener = reprlib.Repr()
_shortener.maxlist = _shortener.maxdict = 8
_shortener.maxlevel = 2
_shortener.maxstring = 100


class Fields:
    """The fields of one JSON object; null counts as absent.

    Every read raises a CheckpointError that names ``where``, the field and its value, if the field is missing and has no default, or
    is not what is asked for.

    Args:
        values: the object.
        where: the file, and the way to the object in it.
    """

    def __init__(self, values: dict[str, object], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, name: str, default: object = None) -> object:
        """Return the field, of whatever type."""
        value = self.values.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where} has no {name}; the model cannot be built without it")
        return value

    def whole(self, name: str, default: int | None = None, *, low: int = 1, high: int = (1 << 31) - 1) -> int:
        """Return a whole number from ``low`` to ``high``."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CheckpointError(f"{self.where}: {name} is {shown(value)}; it must be a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a finite number above 0."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise CheckpointError(f"{self.where}: {name} is {shown(value)}; it must be a finite number above 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {name} is {shown(value)}; it must be true or false")
        return value

    def whole_numbers(self, name: str) -> list[int]:
        """Return a list of whole numbers from 0, empty where the field is missing."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(type(entry) is int and entry >= 0 for entry in value):
            raise CheckpointError(f"{self.where}: {name} is {shown(value)}; it must be a list of whole numbers of at least 0")
        return value

    def object(self, name: str) -> Fields:
        """Return the fields of the object below, none where it is missing."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.where}: {name} is {shown(value)}; it must be an object")
        return Fields(value, f"{self.where}: {name}")


def shown(value: object) -> str:
    """Return the beginning of what a file says, for an error, however large or deep it is."""
    return _shortener.repr(value)
