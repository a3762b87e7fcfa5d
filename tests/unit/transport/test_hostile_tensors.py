"""Tensor metadata that lies: refused with BadFrameError before anything of the announced size is made."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence

import msgpack
import numpy as np
import pytest

from zspmd.errors import BadFrameError
from zspmd.transport.codec import _DTYPES, INLINE_BYTES, NUMPY, TENSOR_EXT, TORCH, ValueEncoder, decode_value, pack_tensor_meta

pytestmark = pytest.mark.usefixtures("no_bridges")
ROOM_BYTES = 64 << 10  # msgpack's own stack has 40 KB, whatever it reads
CODES = {str(dtype) if dtype.names is None else "bf16": code for code, dtype in enumerate(_DTYPES)}
F4 = CODES["float32"]
Case = tuple[bytes, Sequence[bytes]]


def ext(data: bytes) -> bytes:
    body: bytes = msgpack.packb(msgpack.ExtType(TENSOR_EXT, data))
    return body


def inline(dtype: str, shape: Sequence[int], data: bytes, family: int = NUMPY) -> Case:
    return ext(pack_tensor_meta(CODES[dtype], shape, family, True) + data), ()


def outside(dtype: str, shape: Sequence[int], *buffers: bytes, family: int = NUMPY) -> Case:
    return ext(pack_tensor_meta(CODES[dtype], shape, family, False)), buffers


def raw(*data: int, buffers: Sequence[bytes] = ()) -> Case:
    return ext(bytes(data)), buffers


def several(*cases: Case, buffers: Sequence[bytes]) -> Case:
    """Return a list of tensors, with other buffers than theirs."""
    return bytes((0x90 | len(cases),)) + b"".join(body for body, _ in cases), buffers


HEAD_F4 = F4 << 3
IN, OUT = 0x20, 0x00
LONGEST = (0xFF,) * 6 + (0x7F,)  # a dim of 2**49 - 1
CASES: dict[str, Case] = {
    # no metadata, or the wrong bits
    "nothing": raw(),
    "one byte": raw(HEAD_F4),
    "a dtype after the last": raw(len(_DTYPES) << 3, IN),
    "the largest dtype code": raw(31 << 3, IN),
    "family 2": raw(HEAD_F4, 0x80 | IN),
    "family 3": raw(HEAD_F4, 0xC0 | IN),
    **{f"reserved bit {bit}": raw(HEAD_F4, IN | 1 << bit, 0, 0, 0, 0) for bit in range(5)},
    # dims that end too early, or never
    "a dim that is not there": raw(HEAD_F4 | 1, IN),
    "the second of two dims is not there": raw(HEAD_F4 | 2, IN, 1),
    "the last of seven dims is not there": raw(HEAD_F4 | 7, IN, 1, 1, 1, 1, 1, 1),
    "a dim cut after its first byte": raw(HEAD_F4 | 1, IN, 0x80),
    "a dim cut after its sixth byte": raw(HEAD_F4 | 1, IN, *(0x80,) * 6),
    "a dim of eight bytes": raw(HEAD_F4 | 1, IN, *(0xFF,) * 7, 0x01),
    "a dim of ten bytes, as -1 would be": raw(HEAD_F4 | 1, IN, *(0xFF,) * 9, 0x01),
    "a dim without end": raw(HEAD_F4 | 1, IN, *(0xFF,) * 60),
    "seven dims without end": raw(HEAD_F4 | 7, OUT, *(0xFF,) * 60),
    # sizes that are not there
    "2**40 numbers inline": inline("float32", (1 << 40,), b""),
    "2**40 bytes inline": inline("uint8", (1 << 40,), bytes(8)),
    "2**40 numbers in an empty buffer": outside("float32", (1 << 40,), b""),
    "2**48 numbers in a buffer": outside("float64", (1 << 48,), bytes(64)),
    "the largest dim": raw(HEAD_F4 | 1, IN, *LONGEST, 0, 0, 0, 0),
    "2**31 by 2**31": outside("float32", (1 << 31, 1 << 31), bytes(16)),
    "2**32 by 2**32, whose product is 0 in 64 bits": outside("uint8", (1 << 32, 1 << 32), b""),
    "2**32 by 2**30 float32, 0 in 64 bits": inline("float32", (1 << 32, 1 << 30), b""),
    "2**21 cubed and a half, -2**63 in 64 bits": inline("uint8", (1 << 21, 1 << 21, 1 << 21), bytes(16)),
    "seven times the largest dim": outside("complex128", ((1 << 49) - 1,) * 7, bytes(16)),
    "seven times the largest dim, inline": inline("complex128", ((1 << 49) - 1,) * 7, bytes(16)),
    "a huge dim beside an empty one": inline("float32", (0, 1 << 48, 1 << 48), b""),
    "a huge dim beside an empty one, in a buffer": outside("float32", (1 << 48, 0, 1 << 48), b""),
    "empty, of seven dims": inline("float32", (1 << 48,) * 6 + (0,), b""),
    # data of another length
    **{f"{dtype}: a byte too few": inline(dtype, (4,), bytes(4 * _DTYPES[code].itemsize - 1)) for dtype, code in CODES.items()},
    "a byte too many": inline("int64", (4,), bytes(33)),
    "no data": inline("int64", (4,), b""),
    "data of an empty tensor": inline("int64", (0,), bytes(8)),
    "data of a number twice": inline("float64", (), bytes(16)),
    "a number without data": inline("float64", (), b""),
    "a buffer too short": outside("float32", (2000,), bytes(7999)),
    "a buffer too long": outside("float32", (2000,), bytes(8001)),
    "a buffer of another dtype": outside("float64", (2000,), bytes(8000)),
    "an empty buffer": outside("float32", (2000,), b""),
    "a large one inline and short": inline("uint8", (INLINE_BYTES * 100,), bytes(INLINE_BYTES)),
    "torch's: a byte too few": inline("bf16", (4,), bytes(7), family=TORCH),
    "torch's: 2**40 in a buffer": outside("bf16", (1 << 40,), bytes(8), family=TORCH),
    # buffers that do not add up
    "a buffer that is missing": outside("float32", (2000,)),
    "a buffer that nobody names": (b"\xc0", [bytes(8000)]),
    "a buffer beside inline data": (inline("uint8", (4,), bytes(4))[0], [bytes(4)]),
    "one buffer for two tensors": several(outside("uint8", (5000,)), outside("uint8", (5000,)), buffers=[bytes(10_000)]),
    "the sum is right and each is wrong": several(outside("uint8", (5000,)), outside("uint8", (6000,)), buffers=[bytes(6000), bytes(5000)]),
    "two buffers for one tensor": several(outside("uint8", (10_000,)), buffers=[bytes(5000), bytes(5000)]),
    "the second buffer is missing": several(outside("uint8", (5000,)), outside("uint8", (5000,)), buffers=[bytes(5000)]),
    "fifteen times 2**40": several(*(outside("float32", (1 << 40,)) for _ in range(15)), buffers=[b""] * 15),
    # in places where no tensor may be
    "as a key": (b"\x81" + inline("uint8", (4,), bytes(3))[0] + b"\1", ()),
    "another ext type with sound metadata": (msgpack.packb(msgpack.ExtType(2, pack_tensor_meta(F4, (1,), NUMPY, True) + bytes(4))), ()),
    "a timestamp of 4 bytes": (b"\xd6\xff" + bytes(4), ()),
    "a timestamp of 8 bytes": (b"\x91\x91\xd7\xff" + bytes(8), ()),
    "a timestamp of 12 bytes": (b"\x81\xa1a\xc7\x0c\xff" + bytes(12), ()),
    "a timestamp as a key": (b"\x81\xd6\xff" + bytes(4) + b"\1", ()),
    "a timestamp of 5 bytes": (b"\xc7\x05\xff" + bytes(5), ()),
}


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 50


@pytest.mark.parametrize("name", CASES)
def test_metadata_that_lies_is_refused_before_anything_is_made(name: str) -> None:
    body, buffers = CASES[name]
    with pytest.raises(BadFrameError):
        decode_value(body, buffers)  # once unmeasured: the first error imports and caches
    tracemalloc.start()
    try:
        with pytest.raises(BadFrameError):
            decode_value(body, buffers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 4 * len(body) + ROOM_BYTES


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 5), (40, 50)], ids=str)
def test_metadata_that_tells_the_truth_is_taken(dtype: str, shape: tuple[int, ...]) -> None:
    """The same helpers with the right length: the cases above fail for what they say."""
    data = bytes(math.prod(shape) * _DTYPES[CODES[dtype]].itemsize)
    body, buffers = inline(dtype, shape, data) if len(data) <= INLINE_BYTES else outside(dtype, shape, data)
    array = decode_value(body, buffers)
    assert (array.shape, array.tobytes()) == (shape, data)


@pytest.mark.parametrize("mark", [b"\xd6\xff", b"\xd7\xff", b"\xc7\x0c\xff"], ids=bytes.hex)
def test_bytes_that_look_like_a_timestamp_are_taken(mark: bytes) -> None:
    value = {"a": [mark * 40, {"b": mark}], "c": 1}
    assert decode_value(*ValueEncoder().encode(value)) == value


def test_a_wrong_tensor_among_good_ones_refuses_the_whole_value() -> None:
    body, buffers = ValueEncoder().encode({"good": np.ones(4), "large": np.ones(5000), "more": np.ones(6000)})
    with pytest.raises(BadFrameError, match="its data 48000"):
        decode_value(body, [bytes(buffers[1]), bytes(buffers[0])])
