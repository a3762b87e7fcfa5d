"""The safetensors files of a model directory: which tensor is in which, and what their headers promise. Standard library only.

    8 B little-endian length n | n B of JSON {name: {dtype, shape, data_offsets: [start, end]}} | data

Offsets count from the end of the header. The tensors must cover the data exactly, so a truncated download shows before a load.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

from .errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 64 << 20  # the index of a model of 140,000 tensors has 15 MB
_MAX_DIMS = 16  # a product of many large dims would take minutes
_MAX_SHOWN = 200
# Dtypes that are not listed are never loaded; their sizes are not checked.
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PLAIN_NAME = re.compile(r"[^/\0]+\.safetensors")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a header: safetensors' dtype name, shape, and the bytes [start, end) after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def find_tensors(directory: Path) -> dict[str, Path]:
    """Return the file of every tensor, from model.safetensors or else model.safetensors.index.json.

    Raises:
        CheckpointError: neither file is there, one is malformed, or the index names a file that is missing or elsewhere.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        return dict.fromkeys(read_safetensors_header(single), single)
    if not index.exists():
        raise CheckpointError(_explain_no_files(directory))
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no object weight_map; download it again")
    return {name: _indexed_file(index, file) for name, file in weight_map.items()}


def has_tensors(directory: Path) -> bool:
    """Return whether there is a file in which ``find_tensors`` looks."""
    return (directory / SINGLE_FILE).exists() or (directory / INDEX_FILE).exists()


def _explain_no_files(directory: Path) -> str:
    pickles = sorted(path.name for path in directory.glob("*") if path.suffix in _PICKLES)
    if pickles:
        return (
            f"{directory} has its weights only in {pickles[0]}, a pickle, which can run code and is never loaded; "
            "convert it to safetensors with save_pretrained of Transformers"
        )
    return f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a directory that holds the weights"


def _indexed_file(index: Path, file: object) -> Path:
    # An index from elsewhere must not reach outside its directory.
    if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
        raise CheckpointError(f"{index} names the file {reprlib.repr(file)}; it must be the plain name of a safetensors file beside it")
    path = index.parent / file
    if not path.exists():
        raise CheckpointError(f"{index} names {file}, which is not there; download it")
    return path


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors that a file holds, after checking that they cover the file exactly.

    Raises:
        CheckpointError: unreadable, truncated (``wanted`` and ``found`` bytes) or malformed; the message names the file.
    """
    header_bytes, data_start, size_bytes = _read_header_bytes(path)
    header = _parse_json_object(header_bytes, f"the header of {path}", build=_refuse_twice)
    tensors = {name: _stored_tensor(path, name, entry) for name, entry in header.items() if name != "__metadata__"}
    _check_coverage(path, tensors, data_start=data_start, size_bytes=size_bytes)
    return tensors


def read_json_object(path: Path) -> dict[str, object]:
    """Return the JSON object that a file of a model directory holds.

    Raises:
        CheckpointError: as ``read_small_file``; or not JSON, or not an object; the message names the file.
    """
    return _parse_json_object(read_small_file(path), str(path))


def read_small_file(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return what a file of a model directory holds, one that is no weights.

    Raises:
        CheckpointError: no such file, one above ``max_bytes``, or one that never ends, such as a pipe or device.
    """
    with _open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > max_bytes:
            raise CheckpointError(f"{path} has {size_bytes} B; the limit is {max_bytes}: it belongs to no model")
        return file.read(size_bytes)


@contextmanager
def _open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file whose end will come; OSError, from the use of it too, becomes CheckpointError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without a writer would block
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CheckpointError(f"{path} is no regular file; a model directory holds files, or links to them")
            with open(fd, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; a model directory needs it") from error


def _parse_json_object(data: bytes, what: str, *, build: Callable[[list[tuple[str, object]]], object] = dict) -> dict[str, object]:
    try:
        value = json.loads(data, object_pairs_hook=build)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is a JSON {type(value).__name__}; it must be an object")
    return value


def _refuse_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Readers differ in which of two entries of one name counts: what was checked here is not what another would load."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {_cut(name)} occurs twice")
        found[name] = value
    return found


def _read_header_bytes(path: Path) -> tuple[bytes, int, int]:
    """Return the header's JSON, where the data begins, and the size of the file."""
    with _open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} announces a header of {length} B, over {MAX_HEADER_BYTES}; it is no safetensors file")
        if size_bytes < 8 + length:
            raise _wrong_size(path, wanted=8 + length, found=size_bytes)
        return file.read(length), 8 + length, size_bytes


def _wrong_size(path: Path, *, wanted: int, found: int) -> CheckpointError:
    what = "truncated" if found < wanted else "too long"
    return CheckpointError(
        f"{path} is {what}: {found} B where its header asks for {wanted} B; download it again", wanted=wanted, found=found
    )


def _stored_tensor(path: Path, name: str, entry: object) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(shape) > _MAX_DIMS or len(offsets) != 2:
        raise CheckpointError(f"{path}: the header entry of {_cut(name)} is malformed; download it again", tensor=name)
    stored = StoredTensor(dtype, tuple(shape), offsets[0], offsets[1])
    wanted = math.prod(stored.shape) * _ITEM_BYTES.get(dtype, 0)
    if dtype in _ITEM_BYTES and stored.end - stored.start != wanted:
        message = f"{path}: {_cut(name)} ({dtype} {shape}) takes {wanted} B, but its offsets {offsets} hold {stored.end - stored.start} B"
        raise CheckpointError(message, tensor=name, wanted=wanted, found=stored.end - stored.start)
    return stored


def _cut(text: str) -> str:
    """Return the beginning of what a file says, for an error."""
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 63 for v in value)


def _check_coverage(path: Path, tensors: dict[str, StoredTensor], *, data_start: int, size_bytes: int) -> None:
    at = 0
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != at or stored.end < at:
            raise CheckpointError(
                f"{path}: {_cut(name)} lies at [{stored.start}, {stored.end}) where the one before it ends at {at}; download it again",
                tensor=name,
            )
        at = stored.end
    if data_start + at != size_bytes:
        raise _wrong_size(path, wanted=data_start + at, found=size_bytes)
