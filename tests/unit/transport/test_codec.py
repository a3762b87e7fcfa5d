"""Values through the codec: what comes back, what is copied, how large it is, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
import pytest

from zspmd.errors import BadFrameError
from zspmd.transport.codec import (
    _DTYPES,
    BFLOAT16,
    INLINE_BYTES,
    MAX_BODY_BYTES,
    MAX_DEPTH,
    MAX_NDIM,
    NUMPY,
    TENSOR_EXT,
    TORCH,
    ValueEncoder,
    bfloat16_to_float32,
    decode_value,
    pack_tensor_meta,
    unpack_tensor_meta,
)

pytestmark = pytest.mark.usefixtures("no_bridges")
LARGE = INLINE_BYTES + 1


def round_trip(value: object) -> Any:
    body, buffers = ValueEncoder().encode(value)
    return decode_value(body, [bytes(buffer) for buffer in buffers])


def sample(dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[Any]]:
    """Return random bits of a dtype (for bool, 0 and 1)."""
    bits = np.random.default_rng(0).integers(0, 256, math.prod(shape) * dtype.itemsize, np.uint8)
    return (bits & 1 if dtype == np.dtype(bool) else bits).view(dtype).reshape(shape)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(1 << 63),
        (1 << 64) - 1,
        -1.5,
        math.inf,
        "",
        "zażółć",
        b"\0\xff",
        [],
        {},
        [1, [2, [3.0, None]], {"a": [b"x"]}],
        {"a": 1, 5: {"b": False}},
    ],
    ids=repr,
)
def test_plain_values_come_back_with_their_types(value: object) -> None:
    back = round_trip(value)
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (0, 5), (1, 2, 3, 1, 2, 1, 2), (65, 65)], ids=str)
@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_arrays_of_every_dtype_come_back(dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    array = sample(dtype, shape)
    back = round_trip({"x": [array]})["x"][0]
    assert (back.dtype, back.shape) == (dtype, shape)
    assert back.tobytes() == array.tobytes()
    assert not back.flags.writeable


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12).reshape(3, 4).T,
        np.arange(40_000, dtype=np.float32)[::2],
        np.arange(6, dtype=">i4").reshape(2, 3),
        np.arange(10_000, dtype=">f8"),
        np.asfortranarray(np.ones((100, 100))),
        np.broadcast_to(np.float32(2.0), (50, 50)),
    ],
    ids=["transposed", "strided", "big endian", "big endian, large", "Fortran order", "broadcast"],
)
def test_arrays_of_any_layout_come_back(array: np.ndarray[Any, np.dtype[Any]]) -> None:
    back = round_trip(array)
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype.newbyteorder("<")


def test_several_large_arrays_keep_their_places() -> None:
    arrays = [np.full(LARGE, i, np.uint8) for i in range(5)]
    body, buffers = ValueEncoder().encode({"a": arrays[:2], "small": np.zeros(3), "b": {"c": arrays[2], 1: arrays[3:]}})
    assert len(buffers) == 5
    value = decode_value(body, buffers)
    back = [*value["a"], value["b"]["c"], *value["b"][1]]
    assert [int(array[0]) for array in back] == [0, 1, 2, 3, 4]


def test_a_large_array_is_copied_neither_here_nor_there() -> None:
    array = np.arange(LARGE, dtype=np.uint8)
    body, buffers = ValueEncoder().encode(array)
    assert len(body) < 16
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), array)
    assert np.shares_memory(decode_value(body, buffers), array)


def test_an_array_up_to_the_limit_travels_inside_the_body() -> None:
    body, buffers = ValueEncoder().encode(np.arange(INLINE_BYTES, dtype=np.uint8))
    assert (len(buffers), len(body)) == (0, INLINE_BYTES + 4 + 4)  # msgpack's ext 16 header, and metadata with a two-byte dim


def test_an_encoder_is_as_new_after_an_error() -> None:
    encoder = ValueEncoder()
    with pytest.raises(TypeError):
        encoder.encode([np.zeros(LARGE), object()])
    body, buffers = encoder.encode([1, 2])
    assert (decode_value(body, buffers), buffers) == ([1, 2], [])


def test_bfloat16_is_named_without_torch_and_has_its_numbers() -> None:
    bits = np.array([0x0000, 0x3F80, 0xC040, 0x7F80, 0x0001], np.uint16)
    back = round_trip(bits.view(BFLOAT16))
    assert back.dtype == BFLOAT16
    assert bfloat16_to_float32(back).tolist() == [0.0, 1.0, -3.0, math.inf, 2.0**-133]


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def own_parent() -> list[Any]:
    value: list[Any] = []
    value.append({"me": value})
    return value


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ({"x": [0, (1, 2)]}, TypeError, r"value\['x'\]\[1\] is a builtins.tuple; .* send a list"),
        ([{1, 2}], TypeError, r"value\[0\] is a builtins.set; .* send a list"),
        ({"x": {3: np.float32(1)}}, TypeError, r"value\['x'\]\[3\] is a numpy.float32; .* send .item\(\) of it"),
        (object(), TypeError, "value is a builtins.object"),
        ({"f": len}, TypeError, r"value\['f'\] is a builtins.builtin_function_or_method"),
        ({(1,): 2}, TypeError, r"value has the key \(1,\) of type tuple; keys must be None, bool, int, float, str or bytes"),
        ([1 << 64], ValueError, r"value\[0\] is 18446744073709551616, beyond 64 bits; send it as str"),
        ([-(1 << 63) - 1], ValueError, "beyond 64 bits"),
        ({"x": np.array(["a"])}, TypeError, r"value\['x'\] is an array of dtype <U1"),
        ([np.array([object()])], TypeError, r"value\[0\] is an array of dtype object"),
        (np.zeros((1,) * (MAX_NDIM + 1)), TypeError, "8 dims; numbers, bool and up to 7 dims"),
        (np.ma.masked_array([1], [True]), TypeError, "value is a numpy.ma.*MaskedArray"),
        (nested(2000), ValueError, f"nested deeper than {MAX_DEPTH} levels"),
        (own_parent(), ValueError, "or contains itself"),
    ],
    ids=[
        "tuple",
        "set",
        "NumPy scalar",
        "object",
        "function",
        "tuple key",
        "large int",
        "small int",
        "text array",
        "object array",
        "too many dims",
        "masked array",
        "too deep",
        "endless",
    ],
)
def test_what_may_not_travel_is_named_by_its_path(value: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ValueEncoder().encode(value)


def test_bulk_data_in_plain_values_is_refused() -> None:
    half = bytes(MAX_BODY_BYTES // 2)
    with pytest.raises(ValueError, match=f"the limit is {MAX_BODY_BYTES}: send bulk data as arrays"):
        ValueEncoder().encode([half, half])


@pytest.mark.parametrize(
    ("shape", "num_bytes"), [((), 2), ((5,), 3), ((127, 128), 5), ((16_383, 16_383, 16_383), 8), ((1 << 48,), 9)], ids=str
)
def test_metadata_is_small_and_comes_back(shape: tuple[int, ...], num_bytes: int) -> None:
    for code, dtype in enumerate(_DTYPES):
        for family in (NUMPY, TORCH):
            meta = pack_tensor_meta(code, shape, family, family == TORCH)
            assert len(meta) == num_bytes
            assert unpack_tensor_meta(meta + b"data") == (dtype, shape, family, family == TORCH, num_bytes)


def tensor(meta: bytes, data: bytes = b"") -> bytes:
    body: bytes = msgpack.packb(msgpack.ExtType(TENSOR_EXT, meta + data))
    return body


F4 = _DTYPES.index(np.dtype("<f4"))


@pytest.mark.parametrize(
    ("body", "buffers", "words"),
    [
        (b"", [], "no valid value"),
        (b"\x93\x01", [], "no valid value"),
        (b"\x01\x02", [], "no valid value"),
        (b"\xc1", [], "no valid value"),
        (b"\xdd\xff\xff\xff\xff", [], "no valid value"),
        (b"\xc6\xff\xff\xff\xff", [], "no valid value"),
        (b"\xa1\xff", [], "no valid value"),
        (b"\x91" * 5000, [], "no valid value"),
        (b"\x81\x90\x01", [], "no valid value"),
        (msgpack.packb(msgpack.ExtType(2, b"x")), [], "ext type 2; the only one is 1"),
        (tensor(b"\0"), [], "metadata of 1 B; it has at least 2"),
        (tensor(bytes((31 << 3, 0x20))), [], f"dtype code 31 of {len(_DTYPES)}"),
        (tensor(bytes((0, 0xA0))), [], "family 2 of 2"),
        (tensor(bytes((0, 0x21))), [], "metadata 0021"),
        (tensor(bytes((F4 << 3 | 1, 0x20)) + b"\x80"), [], "ends inside a dim"),
        (tensor(bytes((F4 << 3 | 1, 0x20)) + b"\xff" * 7 + b"\x01"), [], r"a dim is above 2\*\*49"),
        (tensor(pack_tensor_meta(F4, (3,), NUMPY, True), bytes(11)), [], r"shape \(3,\) and dtype float32 has 12 B, its data 11"),
        (tensor(pack_tensor_meta(F4, (3,), NUMPY, True), bytes(16)), [], "has 12 B, its data 16"),
        (tensor(pack_tensor_meta(F4, (1 << 48,) * 7, NUMPY, True)), [], "its data 0"),
        (tensor(pack_tensor_meta(F4, (1 << 48, 1 << 48, 0), NUMPY, True)), [], "no valid value"),
        (tensor(pack_tensor_meta(F4, (4,), NUMPY, False)), [], "names tensor buffer 1, the message has 0"),
        (tensor(pack_tensor_meta(F4, (4,), NUMPY, False)), [bytes(15)], "has 16 B, its data 15"),
        (tensor(pack_tensor_meta(F4, (4,), NUMPY, False)), [bytes(16), b""], "has 2 tensor buffers, its body names 1"),
        (b"\xc0", [b""], "has 1 tensor buffers, its body names 0"),
        (bytes(MAX_BODY_BYTES + 1), [], f"the limit is {MAX_BODY_BYTES}"),
    ],
    ids=[
        "empty",
        "cut list",
        "two values",
        "reserved byte",
        "endless list",
        "endless bytes",
        "no UTF-8",
        "too deep",
        "list as key",
        "other ext type",
        "no metadata",
        "unknown dtype",
        "unknown family",
        "bits that must be zero",
        "cut dim",
        "huge dim",
        "too little data",
        "too much data",
        "huge shape",
        "huge shape of nothing",
        "missing buffer",
        "short buffer",
        "buffer left over",
        "buffer without a tensor",
        "too large",
    ],
)
def test_a_bad_body_is_a_bad_frame(body: bytes, buffers: list[bytes], words: str) -> None:
    with pytest.raises(BadFrameError, match=words):
        decode_value(body, buffers)
