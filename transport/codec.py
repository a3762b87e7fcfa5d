"""Plain values, NumPy arrays and torch tensors as bytes.

A value becomes one msgpack body and a list of raw buffers. A tensor in the body is ext type 1: its metadata (two bytes and LEB128
dims) and, up to ``INLINE_BYTES``, its data; larger data is a buffer of its own, neither copied here nor on arrival. Buffers are in
the order in which their tensors occur in the body.

    metadata    dtype code u5, ndim u3 | family u2 (0 NumPy, 1 torch), inline u1, zero u5 | dims, LEB128 each

What may travel: None, bool, int (64 bit), float, str, bytes, list, dict (with such keys, bar the list), NumPy arrays, torch tensors.
Nothing here runs what a peer sends: no pickle, dtypes come from a table, and lengths are checked before anything is allocated: a body
that is cut short, or whose containers announce more than there is, costs little more memory than its own size to refuse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgpack
import numpy as np
import numpy.typing as npt

from ..errors import BadFrameError
from .frames import MAX_BUFFERS, Buffer

AnyArray = npt.NDArray[Any]

INLINE_BYTES = 4096
MAX_BODY_BYTES = 64 << 20
MAX_NDIM = 7
MAX_DEPTH = 500  # msgpack's packer stops a little above
_HARMLESS_BYTES = 128  # a body this small cannot announce more than some 40 KB in all
TENSOR_EXT = 1
NUMPY, TORCH = 0, 1
_NO_VALUE = (ValueError, TypeError, msgpack.UnpackException, RecursionError)
# by the first byte of a body: fixint, fixstr, nil, bool, bin, float, int, str; the others are maps, arrays, ext types and 0xc1, never used
_IS_SCALAR = [
    byte < 0x80 or 0xA0 <= byte <= 0xBF or byte in (0xC0, *range(0xC2, 0xC7), *range(0xCA, 0xD4), *range(0xD9, 0xDC)) or byte >= 0xE0
    for byte in range(256)
]

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
"""How a bf16 tensor looks where there is no torch: its raw 16 bits, under a name. ``bfloat16_to_float32`` gives the numbers."""

_DTYPES: tuple[np.dtype[Any], ...] = (
    *(np.dtype(name) for name in ("bool", "<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8", "<c8", "<c16")),
    BFLOAT16,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


class TensorBridge(Protocol):
    """What teaches the codec a tensor library. ``workers.torch_bridge`` registers torch's; this package never imports it."""

    def matches(self, value: object) -> bool:
        """Whether ``value`` is a tensor of this library."""

    def to_array(self, tensor: Any) -> AnyArray:
        """Return the tensor as an array over the same memory, on the CPU; bf16 as ``BFLOAT16``."""

    def from_array(self, array: AnyArray) -> object:
        """Return the array as a tensor over the same memory."""


_bridges: dict[int, TensorBridge] = {}


def register_bridge(family: int, bridge: TensorBridge) -> None:
    """Let tensors of a library travel as themselves from now on, in this process."""
    _bridges[family] = bridge


def as_array(value: object) -> AnyArray | None:
    """Return an array or tensor as an array over the same memory where it can be, anything else as None."""
    if type(value) is np.ndarray:
        return value
    family = _family(value)
    return None if family is None else _bridges[family].to_array(value)


def bfloat16_to_float32(array: AnyArray) -> npt.NDArray[np.float32]:
    """Return the numbers of a ``BFLOAT16`` array, exactly."""
    return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)


class ValueEncoder:
    """Turns values into bodies and buffers. Not thread-safe: one encoder for each thread."""

    def __init__(self) -> None:
        self._buffers: list[Buffer] = []
        self._packer = msgpack.Packer(default=self._pack_tensor, strict_types=True)

    def encode(self, value: object) -> tuple[bytes, list[Buffer]]:
        """Return body and buffers. The buffers are views: leave the arrays unchanged until the message has been answered.

        Raises:
            TypeError: something that may not travel; names its path, such as ``value['x'][0]``.
            ValueError: an integer beyond 64 bits, text that is no UTF-8, nesting beyond the limit, over 1,024 large arrays, or a body over
                64 MiB.
        """
        try:
            body: bytes = self._packer.pack(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            self._packer.reset()
            _explain(value, "value", 0)
            raise
        finally:
            buffers, self._buffers = self._buffers, []  # what was sent is not kept alive here
        if len(buffers) > MAX_BUFFERS:
            raise ValueError(
                f"the value holds {len(buffers)} arrays of more than {INLINE_BYTES} B; the limit is {MAX_BUFFERS}: stack some of them"
            )
        if len(body) > MAX_BODY_BYTES:
            raise ValueError(f"the value packs to {len(body)} B; the limit is {MAX_BODY_BYTES}: send bulk data as arrays")
        return body, buffers

    def _pack_tensor(self, value: object) -> msgpack.ExtType:
        family = _family(value)
        if family is None:
            raise TypeError(f"a {type(value).__name__} may not travel")
        array: AnyArray = _bridges[family].to_array(value) if family != NUMPY else value  # type: ignore[assignment]  # as _family says
        little = array if array.dtype.byteorder != ">" else array.astype(array.dtype.newbyteorder("<"))
        code = _CODES.get(little.dtype)
        if code is None or array.ndim > MAX_NDIM:
            raise TypeError(f"an array of dtype {array.dtype} and {array.ndim} dims may not travel")
        data = np.ascontiguousarray(little).reshape(-1).view(np.uint8).data
        inline = len(data) <= INLINE_BYTES
        meta = pack_tensor_meta(code, array.shape, family, inline)
        if inline:
            return msgpack.ExtType(TENSOR_EXT, meta + bytes(data))
        self._buffers.append(data)
        return msgpack.ExtType(TENSOR_EXT, meta)


def decode_value(body: Buffer, buffers: Sequence[Buffer]) -> Any:
    """Return the value; large arrays are read-only views of their buffers.

    Raises:
        BadFrameError: no valid body, metadata that does not fit its data, or buffers left over or missing.
    """
    if len(body) > MAX_BODY_BYTES:
        raise BadFrameError(f"a body of {len(body)} B; the limit is {MAX_BODY_BYTES}")
    if not buffers and body and _IS_SCALAR[body[0]]:  # nothing can be announced that is not there, and it is no tensor and no timestamp
        try:
            return msgpack.unpackb(body)
        except _NO_VALUE as error:
            raise _no_value(error) from error
    taken = iter(buffers)
    used = 0

    def unpack_tensor(code: int, data: bytes) -> object:
        nonlocal used
        if code != TENSOR_EXT:
            raise BadFrameError(f"ext type {code}; the only one is {TENSOR_EXT}, a tensor")
        dtype, shape, family, inline, meta_bytes = unpack_tensor_meta(data)
        raw: Buffer
        if inline:
            raw = bytearray(memoryview(data)[meta_bytes:])  # writable and aligned; small by definition
        else:
            used += 1
            try:
                raw = next(taken)
            except StopIteration:
                raise BadFrameError(f"the body names tensor buffer {used}, the message has {len(buffers)}") from None
        return _tensor(raw, dtype, shape, family)

    try:
        if len(body) > _HARMLESS_BYTES:
            _walk(body)
        value = msgpack.unpackb(body, ext_hook=unpack_tensor, strict_map_key=False)
        _refuse_timestamps(value, bytes(body))
    except BadFrameError:
        raise
    except _NO_VALUE as error:
        raise _no_value(error) from error
    if used != len(buffers):
        raise BadFrameError(f"the message has {len(buffers)} tensor buffers, its body names {used}")
    return value


def _no_value(error: Exception) -> BadFrameError:
    return BadFrameError(f"the body is no valid value: {type(error).__name__}: {error}")


def pack_tensor_meta(code: int, shape: Sequence[int], family: int, inline: bool) -> bytes:
    """Return two bytes and one varint a dim: at most 8 B for three dims below 16,384."""
    meta = bytearray((code << 3 | len(shape), family << 6 | inline << 5))
    for dim in shape:
        while dim >= 0x80:
            meta.append(dim & 0x7F | 0x80)
            dim >>= 7
        meta.append(dim)
    return bytes(meta)


def unpack_tensor_meta(data: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int, bool, int]:
    """Return dtype, shape, family, whether the data follow inline, and how many bytes the metadata took."""
    if len(data) < 2:
        raise BadFrameError(f"tensor metadata of {len(data)} B; it has at least 2")
    code, ndim, family, inline = data[0] >> 3, data[0] & 7, data[1] >> 6, bool(data[1] >> 5 & 1)
    if code >= len(_DTYPES) or family not in (NUMPY, TORCH) or data[1] & 0x1F:
        raise BadFrameError(f"tensor metadata {data[:2].hex()}: dtype code {code} of {len(_DTYPES)}, family {family} of 2")
    shape, at = [], 2
    for _ in range(ndim):
        dim = shift = 0
        while True:
            if at >= len(data) or shift > 42:
                raise BadFrameError(f"tensor metadata of {len(data)} B ends inside a dim, or a dim is above 2**49")
            byte = data[at]
            at += 1
            dim |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        shape.append(dim)
    return _DTYPES[code], tuple(shape), family, inline, at


def _walk(body: Buffer) -> None:
    """Go through a body without building anything; raises where it ends too early, too late, or is nested too deep.

    msgpack makes room for as many items as a list announces before it reads the first: lists within lists that lie would have it
    allocate a thousand times the body.
    """
    unpacker = msgpack.Unpacker(read_size=len(body), max_buffer_size=len(body))
    unpacker.feed(body)
    unpacker.skip()
    if unpacker.tell() != len(body):
        raise ValueError(f"it ends after {unpacker.tell()} of {len(body)} B")


def _refuse_timestamps(value: object, body: bytes) -> None:
    """msgpack builds ext type -1 itself, without asking the hook; its three headers seldom occur even by chance."""
    if b"\xff" not in body:  # 3 us a step sooner: one byte is found by memchr
        return
    if b"\xd6\xff" not in body and b"\xd7\xff" not in body and b"\xc7\x0c\xff" not in body:
        return
    left = [value]
    while left:
        item = left.pop()
        if type(item) is dict:
            left += [*item.keys(), *item.values()]
        elif type(item) is list:
            left += item
        elif isinstance(item, msgpack.Timestamp):
            raise BadFrameError(f"ext type -1, a timestamp; the only one is {TENSOR_EXT}, a tensor")


def _tensor(raw: Buffer, dtype: np.dtype[Any], shape: tuple[int, ...], family: int) -> object:
    wanted = dtype.itemsize
    for dim in shape:
        wanted *= dim
    if wanted != len(raw):
        raise BadFrameError(f"a tensor of shape {shape} and dtype {dtype} has {wanted} B, its data {len(raw)}")
    array = np.frombuffer(raw, dtype).reshape(shape)
    bridge = _bridges.get(family)
    if bridge is not None:
        return bridge.from_array(array)
    array.flags.writeable = False
    return array


def _family(value: object) -> int | None:
    if type(value) is np.ndarray:
        return NUMPY
    return next((family for family, bridge in _bridges.items() if bridge.matches(value)), None)


def _explain(value: object, path: str, depth: int) -> None:
    """Raise the error that names the path of what may not travel; return if nothing is wrong at or below it."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{path} is nested deeper than {MAX_DEPTH} levels (or contains itself); flatten it")
    kind, family = type(value), _family(value)
    if type(value) is dict:
        for key, item in value.items():
            if type(key) not in (str, int, float, bool, bytes, type(None)):
                raise TypeError(
                    f"{path} has the key {key!r} of type {type(key).__name__}; keys must be None, bool, int, float, str or bytes"
                )
            _explain(item, f"{path}[{key!r}]", depth + 1)
    elif type(value) is list:
        for index, item in enumerate(value):
            _explain(item, f"{path}[{index}]", depth + 1)
    elif type(value) is str:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{path} is no text that UTF-8 can hold: {error}; send it as bytes") from error
    elif type(value) is int:
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"{path} is {value}, beyond 64 bits; send it as str")
    elif family is not None:
        _explain_tensor(value, path, family)
    elif value is not None and kind not in (bool, float, str, bytes, bytearray, memoryview):
        hint = {"tuple": "; send a list", "set": "; send a list", "Tensor": "; call zspmd.workers.torch_bridge.register_torch() first"}
        advice = hint.get(kind.__name__, "; send .item() of it" if isinstance(value, np.generic) else "")
        raise TypeError(
            f"{path} is a {kind.__module__}.{kind.__qualname__}; None, bool, int, float, str, bytes, list, dict, "
            f"NumPy arrays and torch tensors may travel{advice}"
        )


def _explain_tensor(value: object, path: str, family: int) -> None:
    try:
        array: AnyArray = _bridges[family].to_array(value) if family in _bridges else value  # type: ignore[assignment]  # as _family says
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{path} is a tensor that may not travel: {error}") from error
    if array.dtype.newbyteorder("<") not in _CODES or array.ndim > MAX_NDIM:
        raise TypeError(
            f"{path} is an array of dtype {array.dtype} and {array.ndim} dims; numbers, bool and up to {MAX_NDIM} dims may travel"
        )
