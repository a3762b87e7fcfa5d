"""Typed records over msgpack: dataclasses whose fields carry a type and a bound that are checked on both sides.

A record is a frozen dataclass. On the wire it is a map: ``"record"`` with its name, then its fields. Reading goes from field to field
and checks each by name, type and bound, so that nothing is built that the record does not declare; unknown and missing fields are errors.
Each protocol has a family of records of its own, with its own size limit: a subclass of ``Record`` that says so, and under which its
records are subclasses.

    class ControlRecord(Record, max_bytes=1 << 20): ...

    @dataclass(frozen=True)
    class Progress(ControlRecord):
        done: int = whole(MAX_SEQ)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, ClassVar, TypeVar

import msgpack

from ..errors import BadFrameError
from .frames import Buffer

_MAX_FIELDS = 64
_MAX_MAPPING = 65_536


class Record:
    """Base of all families of records."""

    kinds: ClassVar[dict[str, type[Record]]]
    max_bytes: ClassVar[int]

    def __init_subclass__(cls, *, max_bytes: int | None = None) -> None:
        if max_bytes is not None:
            cls.kinds, cls.max_bytes = {}, max_bytes
        else:
            cls.kinds[cls.__name__] = cls


FamilyT = TypeVar("FamilyT", bound=Record)


def whole(high: int, low: int = 0, **options: Any) -> Any:
    """Declare an int field from ``low`` to ``high``."""
    return field(metadata={"type": int, "low": low, "high": high}, **options)


def number(low: float = -math.inf, high: float = math.inf, **options: Any) -> Any:
    """Declare a field of a finite float from ``low`` to ``high``; whole numbers are taken too."""
    return field(metadata={"type": float, "low": low, "high": high}, **options)


def flag(**options: Any) -> Any:
    """Declare a bool field."""
    return field(metadata={"type": bool}, **options)


def text(max_length: int, *, choices: Sequence[str] = (), is_optional: bool = False, **options: Any) -> Any:
    """Declare a str field of at most so many characters, perhaps one of ``choices``, perhaps None."""
    return field(metadata={"type": str, "high": max_length, "choices": tuple(choices), "is_optional": is_optional}, **options)


def blob(max_bytes: int, **options: Any) -> Any:
    """Declare a bytes field of at most so many bytes."""
    return field(metadata={"type": bytes, "high": max_bytes}, **options)


def many(item: type, max_items: int, **options: Any) -> Any:
    """Declare a tuple field of at most so many ``item``s: a plain type, or a record, which travels as a map of its fields."""
    return field(metadata={"type": tuple, "item": item, "high": max_items}, **options)


def mapping(**options: Any) -> Any:
    """Declare a field that is a dict from str to str."""
    return field(metadata={"type": dict}, **options)


def pack_record(record: Record) -> bytes:
    """Return the bytes of a record.

    Raises:
        BadFrameError: a field beyond its own bounds, or more than its family allows; the same check as on arrival, made where it can
            be mended.
    """
    name = type(record).__name__
    data: bytes = msgpack.packb({"record": name, **_plain(record)}, unicode_errors="surrogateescape")
    if len(data) > record.max_bytes:
        raise BadFrameError(f"a {name} packs to {len(data)} B; the limit is {record.max_bytes}")
    return data


def read_record(family: type[FamilyT], data: Buffer) -> FamilyT:
    """Read a record of one family.

    Raises:
        BadFrameError: not such a record, or a field that is missing, unknown, of the wrong type or out of bounds; says which.
    """
    if len(data) > family.max_bytes:
        raise BadFrameError(f"a record of {len(data)} B; the limit is {family.max_bytes}")
    size = max(len(data), 1)  # msgpack takes 0 for no limit
    unpacker = msgpack.Unpacker(
        read_size=size, max_buffer_size=size, max_array_len=0, max_map_len=0, max_ext_len=0, unicode_errors="surrogateescape"
    )
    unpacker.feed(data)
    try:
        record = _read_named(family, unpacker)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise BadFrameError(f"a record is no msgpack map: {type(error).__name__}: {error}") from error
    if unpacker.tell() != len(data):
        raise BadFrameError(f"a record ends after {unpacker.tell()} of {len(data)} B")
    return record


def _plain(record: Record) -> dict[str, Any]:
    """Return a record's fields, checked, nested records as maps."""
    values = {}
    for f in fields(record):  # type: ignore[arg-type]  # each record is a dataclass
        value = _checked(type(record).__name__, f, getattr(record, f.name))
        is_nested = f.metadata["type"] is tuple and issubclass(f.metadata["item"], Record)
        values[f.name] = [_plain(item) for item in value] if is_nested else value
    return values


def _read_named(family: type[FamilyT], unpacker: Any) -> FamilyT:
    count = _count_of(unpacker.read_map_header)
    if count is None or count > _MAX_FIELDS:
        raise BadFrameError(f"a record is not a map of at most {_MAX_FIELDS} fields")
    name = unpacker.unpack() if count and unpacker.unpack() == "record" else None
    kind = family.kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise BadFrameError(f"unknown record {_shown(name)}; known are {', '.join(sorted(family.kinds))}")
    record = _read_fields(kind, count - 1, unpacker)
    if not isinstance(record, family):
        raise BadFrameError(f"a {kind.__name__} arrived where a {family.__name__} is due")
    return record


def _read_fields(kind: type[Record], count: int, unpacker: Any) -> Record:
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # as above
    values: dict[str, Any] = {}
    for _ in range(count):
        name = unpacker.unpack()
        if not isinstance(name, str) or name not in known or name in values:
            raise BadFrameError(f"{kind.__name__} has unknown fields, or one twice: {_shown(name)}")
        values[name] = _read_field(kind.__name__, known[name], unpacker)
    for f in known.values():
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise BadFrameError(f"{kind.__name__} lacks the field {f.name}")
    return kind(**values)


def _read_field(owner: str, f: Field[Any], unpacker: Any) -> Any:
    """Return the next value as the field holds it; containers are entered only where the field is one."""
    wanted, name = f.metadata["type"], f"{owner}.{f.name}"
    try:
        if wanted is tuple and (count := _count_of(unpacker.read_array_header)) is not None:
            _check_length(name, count, f.metadata["high"])
            return tuple(_read_item(name, f.metadata["item"], unpacker) for _ in range(count))
        if wanted is dict and (count := _count_of(unpacker.read_map_header)) is not None:
            _check_length(name, count, _MAX_MAPPING)
            return {_read_item(name, str, unpacker): _read_item(name, str, unpacker) for _ in range(count)}
        return _checked(owner, f, unpacker.unpack())
    except ValueError as error:
        raise BadFrameError(f"{name} is not a {wanted.__name__}: {error}") from error


def _read_item(name: str, wanted: type, unpacker: Any) -> Any:
    if not issubclass(wanted, Record):
        return _item(name, wanted, unpacker.unpack())
    count = _count_of(unpacker.read_map_header)
    if count is None or count > _MAX_FIELDS:
        raise BadFrameError(f"{name} has an item that is not a map of at most {_MAX_FIELDS} fields")
    return _read_fields(wanted, count, unpacker)


def _count_of(read_header: Callable[[], int]) -> int | None:
    """Return how many items the container announces that comes next; None where something else does, which is left in its place."""
    try:
        return read_header()
    except ValueError:
        return None


def _checked(owner: str, f: Field[Any], value: object) -> Any:
    """Return a field's value as its record holds it, or raise what names it."""
    name, wanted, bounds = f"{owner}.{f.name}", f.metadata["type"], f.metadata
    if value is None and bounds.get("is_optional"):
        return None
    if not _is(value, wanted):
        raise BadFrameError(f"{name} is a {type(value).__name__}, not a {wanted.__name__}")
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)):
        return _in_range(name, value, wanted, bounds["low"], bounds["high"])
    if isinstance(value, dict):
        _check_length(name, len(value), _MAX_MAPPING)
        if not all(type(k) is str and type(v) is str for k, v in value.items()):
            raise BadFrameError(f"{name} is not a map of texts to texts")
        return value
    if not isinstance(value, (str, bytes, list, tuple)):
        raise BadFrameError(f"{name} is a {type(value).__name__}, which no field declares")
    _check_length(name, len(value), bounds["high"])
    if isinstance(value, (list, tuple)):
        return tuple(_item(name, bounds["item"], item) for item in value)
    if bounds.get("choices") and value not in bounds["choices"]:
        raise BadFrameError(f"{name} is {value!r:.80}, not one of {', '.join(bounds['choices'])}")
    return value


def _check_length(name: str, length: int, high: int) -> None:
    if length > high:
        raise BadFrameError(f"{name} has length {length}; the limit is {high}")


def _in_range(name: str, value: float, wanted: type, low: float, high: float) -> float:
    if wanted is float and not math.isfinite(value):
        raise BadFrameError(f"{name} is {value}, not finite")
    if not low <= value <= high:
        raise BadFrameError(f"{name} is {value}, outside {low} to {high}")
    return float(value) if wanted is float else value


def _item(name: str, wanted: type, item: object) -> object:
    if not isinstance(item, wanted) or (isinstance(item, bool) and wanted is not bool):
        raise BadFrameError(f"{name} has an item that is a {type(item).__name__}, not a {wanted.__name__}")
    return item


def _is(value: object, wanted: type) -> bool:
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return type(value) in (tuple, list) if wanted is tuple else type(value) is wanted


def _shown(value: object) -> str:
    """Return a few characters of what a peer sent, for an error."""
    return repr(value[:80] if isinstance(value, (str, bytes)) else value)
