"""Torch tensors through the codec: as themselves where torch is, as NumPy arrays where it is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from zspmd.transport import codec
from zspmd.transport.codec import BFLOAT16, INLINE_BYTES, ValueEncoder, bfloat16_to_float32, decode_value
from zspmd.workers.torch_bridge import register_torch

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


@pytest.fixture(autouse=True)
def bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_bridges", {})
    register_torch()


def round_trip(value: object) -> Any:
    body, buffers = ValueEncoder().encode(value)
    return decode_value(body, [bytes(buffer) for buffer in buffers])


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.arange(torch.Size(shape).numel()) % 100).reshape(shape).to(dtype)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (100, 101)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = sample(dtype, shape)
    back = round_trip({"x": tensor})["x"]
    assert isinstance(back, torch.Tensor)
    assert (back.dtype, back.shape, back.device.type) == (dtype, tensor.shape, "cpu")
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("size", [4, 10_000], ids=["small", "large"])
def test_arrays_stay_arrays_beside_tensors(size: int) -> None:
    back = round_trip([np.arange(size), torch.arange(size)])
    assert (type(back[0]), type(back[1])) == (np.ndarray, torch.Tensor)


@pytest.mark.parametrize("size", [4, 10_000], ids=["small", "large"])
def test_bfloat16_goes_both_ways_to_a_process_without_torch(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    tensor = torch.linspace(-3, 3, size).bfloat16()
    body, buffers = ValueEncoder().encode(tensor)
    with monkeypatch.context() as patch:
        patch.setattr(codec, "_bridges", {})
        array = decode_value(body, buffers)
        assert array.dtype == BFLOAT16
        np.testing.assert_array_equal(bfloat16_to_float32(array), tensor.float().numpy())
        body, buffers = ValueEncoder().encode(array)
    back = decode_value(body, buffers)
    assert isinstance(back, np.ndarray)  # it left there as an array
    np.testing.assert_array_equal(back, array)


def test_a_process_without_torch_gets_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    body, buffers = ValueEncoder().encode({"x": torch.eye(3), "y": torch.arange(5000)})
    monkeypatch.setattr(codec, "_bridges", {})
    back = decode_value(body, buffers)
    np.testing.assert_array_equal(back["x"], np.eye(3))
    np.testing.assert_array_equal(back["y"], np.arange(5000))


def test_a_large_tensor_is_copied_neither_here_nor_there() -> None:
    tensor = torch.arange(INLINE_BYTES + 1, dtype=torch.uint8)
    body, buffers = ValueEncoder().encode(tensor)
    assert np.shares_memory(np.frombuffer(buffers[0], np.uint8), tensor.numpy())
    writable = bytearray(buffers[0])
    back = decode_value(body, [writable])
    assert back.data_ptr() == np.frombuffer(writable, np.uint8).ctypes.data


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12).reshape(3, 4).T,
        torch.arange(20_000.0)[::3],
        torch.ones(2, 1).expand(2, 5000),
        torch.ones(3, requires_grad=True),
        torch.nn.Parameter(torch.ones(3)),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
    ],
    ids=["transposed", "strided", "expanded", "needs gradients", "parameter", "conjugated", "negated"],
)
def test_tensors_of_any_layout_come_back(tensor: torch.Tensor) -> None:
    back = round_trip(tensor)
    assert torch.equal(back, tensor)
    assert not back.requires_grad


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(2, dtype=torch.float8_e4m3fn), r"value\['x'\]\[0\] is a tensor that may not travel"),
        (torch.eye(3).to_sparse(), r"value\['x'\]\[0\] is a tensor that may not travel"),
        (torch.zeros((1,) * 8), r"value\['x'\]\[0\] is an array of dtype float32 and 8 dims"),
    ],
    ids=["float8", "sparse", "8 dims"],
)
def test_a_tensor_that_may_not_travel_is_named_by_its_path(tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        ValueEncoder().encode({"x": [tensor]})


def test_without_the_bridge_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_bridges", {})
    with pytest.raises(TypeError, match=r"value\[0\] is a torch.Tensor; .*call zspmd\.workers\.torch_bridge\.register_torch\(\) first"):
        ValueEncoder().encode([torch.ones(1)])
