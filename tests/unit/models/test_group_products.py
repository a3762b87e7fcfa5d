"""Rows times the weight of their group, in each of the ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zspmd.models.group_products import GroupProduct, PlainGroup, build_group_product, has_grouped_product

COUNTS = {"empty-groups": [3, 0, 1, 0], "all-in-the-last": [0, 0, 0, 9], "one-row": [0, 1, 0, 0], "even": [8, 8, 8, 8]}
WAYS = ("packed", "grouped", "one by one")


def build(way: str, weights: Tensor) -> GroupProduct:
    if way == "one by one":
        return PlainGroup(weights)
    return build_group_product(weights, is_packed=way == "packed")


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_products_are_those_of_each_group(way: str, dtype: torch.dtype, counts: list[int]) -> None:
    rows, weights = torch.randn(sum(counts), 16).to(dtype), torch.randn(4, 24, 16).to(dtype)
    assert has_grouped_product(weights)
    wanted = [part @ weight.t() for part, weight in zip(torch.split(rows, counts), weights)]
    torch.testing.assert_close(build(way, weights)(rows, torch.tensor(counts).cumsum(0).int()), torch.cat(wanted))


@pytest.mark.parametrize("shape", [(4, 6, 16), (4, 16, 6)], ids=["out", "in"])
@torch.inference_mode()
def test_odd_sizes_have_no_grouped_product(shape: tuple[int, int, int]) -> None:
    """Rows of 24 bytes, which torch's grouped product refuses."""
    weights, rows, ends = torch.randn(shape), torch.randn(5, shape[2]), torch.tensor([2, 2, 4, 5], dtype=torch.int32)
    assert not has_grouped_product(weights)
    wanted = PlainGroup(weights)(rows, ends)
    torch.testing.assert_close(build_group_product(weights, is_packed=False)(rows, ends), wanted, atol=0, rtol=0)


@torch.inference_mode()
def test_a_product_sees_what_the_loader_writes() -> None:
    """Unless it is packed: then it has the weights of that moment."""
    weights, rows, ends = torch.zeros(1, 16, 16), torch.ones(1, 16), torch.tensor([1], dtype=torch.int32)
    plain, packed = (build_group_product(weights, is_packed=is_packed) for is_packed in (False, True))
    weights.fill_(1)
    assert (plain(rows, ends) == 16).all()
    assert (packed(rows, ends) == 0).all()


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_a_staged_weight_takes_its_place_when_it_is_put_there(way: str) -> None:
    weights, other, rows = torch.randn(3, 16, 16), torch.randn(16, 16), torch.randn(6, 16)
    product, ends = build(way, weights.clone()), torch.tensor([2, 4, 6], dtype=torch.int32)
    before = product(rows, ends)
    put = product.stage(1, other)
    torch.testing.assert_close(product(rows, ends), before, atol=0, rtol=0)
    put()
    torch.testing.assert_close(product(rows, ends), torch.cat((before[:2], rows[2:4] @ other.t(), before[4:])))
