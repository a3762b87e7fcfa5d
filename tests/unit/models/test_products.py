"""Packed products against F.linear: the same numbers, and for a row the same bits whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zspmd.models.products import build_product, can_pack

SIZES = [(24, 40), (64, 509), (256, 1536), (768, 256)]


def make_operands(dtype: torch.dtype, num_rows: int, in_size: int, out_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight, bias = torch.randn(out_size, in_size) * in_size**-0.5, torch.randn(out_size)
    return torch.randn(num_rows, in_size).to(dtype), weight.to(dtype), bias.to(dtype)


@torch.inference_mode()
@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_equals_linear(is_packed: bool, dtype: torch.dtype, size: tuple[int, int], has_bias: bool) -> None:
    """float16 is packed on few processors: elsewhere this is the fallback."""
    x, weight, bias = make_operands(dtype, 17, *size)
    product = build_product(weight, bias if has_bias else None, is_packed=is_packed)
    wanted = F.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for rows in (1, 2, 17):
        torch.testing.assert_close(product(x[:rows]).double(), wanted[:rows], atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="seen to hold with AVX-512 only")
@torch.inference_mode()
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bits_of_a_row_do_not_depend_on_the_others(dtype: torch.dtype, size: tuple[int, int]) -> None:
    x, weight, _ = make_operands(dtype, 64, *size)
    if not can_pack(weight):
        pytest.skip(f"oneDNN does not pack {dtype} on this processor")
    product = build_product(weight, None, is_packed=True)
    whole = product(x)
    for rows in (1, 2, 3, 5, 16, 33):
        assert torch.equal(product(x[:rows].clone()), whole[:rows]), rows


def test_a_packed_product_does_not_see_later_changes() -> None:
    x, weight, _ = make_operands(torch.float32, 3, 24, 40)
    assert can_pack(weight)
    product = build_product(weight, None, is_packed=True)
    before = product(x)
    weight.zero_()
    assert torch.equal(product(x), before)


def test_no_packing_where_the_processor_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not can_pack(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float64))
    assert not can_pack(torch.zeros(2, 2, device="meta"))
