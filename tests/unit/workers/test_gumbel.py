"""The noise: the hash against plain integers, its distribution, and that shards see slices of the whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from zspmd.workers import gumbel
from zspmd.workers.gumbel import Stream, gumbel_noise, row_keys, uniforms

NUM_DRAWS = 1 << 18
NUM_BINS = 64
LIMIT = 63 + 5 * math.sqrt(2 * 63)  # five standard deviations above the mean of chi-square with 63 degrees of freedom


def make_keys(seeds: list[int], positions: list[int], stream: Stream = Stream.SAMPLE) -> Tensor:
    return torch.from_numpy(row_keys(np.array(seeds, np.uint64), np.array(positions, np.int64), stream))


def plain_bits(seed: int, position: int, stream: int) -> int:
    """The module's docstring in whole numbers of Python."""

    def splitmix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    return splitmix64((splitmix64(seed) + (position + stream * 2**32) * 0x9E3779B97F4A7C15) % 2**64)


def plain_noise(seed: int, position: int, token_id: int, stream: int) -> float:
    def fmix32(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    key = plain_bits(seed, position, stream)
    hashed = fmix32(fmix32(token_id ^ key >> 32) ^ key % 2**32)
    return -math.log(-math.log(((hashed ^ 2**31) + 0.5) / 2**32))


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**63 - 1])
@pytest.mark.parametrize("position", [0, 1, 77, 2**24])
@pytest.mark.parametrize("stream", Stream)
def test_noise_equals_plain_integers(seed: int, position: int, stream: Stream) -> None:
    ids = [0, 1, 2, 511, 65_535, 2**31 - 1]
    got = gumbel_noise(make_keys([seed], [position], stream)[:, None], torch.tensor(ids, dtype=torch.int32))[0]
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), [plain_noise(seed, position, i, stream) for i in ids], rtol=1e-12, atol=1e-14)


def test_samples_have_stream_zero_unless_told_otherwise() -> None:
    """Tokens of plain seeded sampling stay what they were before there were streams."""
    assert row_keys(np.array([42], np.uint64), np.array([7])).tolist() == make_keys([42], [7], Stream(0)).tolist()


@pytest.mark.parametrize("seed", [0, 42, 2**63 - 1])
@pytest.mark.parametrize("stream", Stream)
def test_uniforms_equal_plain_integers(seed: int, stream: Stream) -> None:
    got = uniforms(np.full(3, seed, np.uint64), np.array([0, 1, 2**24]), stream)
    assert got.dtype == np.float64
    assert got.tolist() == [((plain_bits(seed, position, stream) >> 12) + 0.5) / 2**52 for position in (0, 1, 2**24)]


@pytest.mark.parametrize("bits", [0, 2**64 - 1], ids=["least", "largest"])
def test_uniforms_reach_neither_end(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gumbel, "_mix", lambda seeds, positions, stream: np.array([bits], np.uint64))
    assert 0 < uniforms(np.zeros(1, np.uint64), np.zeros(1, np.int64), Stream.ACCEPT)[0] < 1


def chi_square(uniform: Tensor) -> float:
    counts = torch.histc(uniform, NUM_BINS, 0, 1)
    expected = uniform.numel() / NUM_BINS
    return float(((counts - expected) ** 2 / expected).sum())


def to_uniform(noise: Tensor) -> Tensor:
    return (-(-noise).exp()).exp()


def draw_uniforms(seeds: list[int], positions: list[int]) -> Tensor:
    """Return the noise that these uniform numbers would make."""
    uniform = uniforms(np.array(seeds, np.uint64), np.array(positions, np.int64), Stream.ACCEPT)
    return -(-torch.from_numpy(uniform).log()).log()


DRAWS = {
    "over-tokens": lambda: gumbel_noise(make_keys([7], [3])[:, None], torch.arange(NUM_DRAWS, dtype=torch.int32)),
    "over-positions": lambda: gumbel_noise(make_keys([7] * NUM_DRAWS, list(range(NUM_DRAWS))), torch.tensor(5, dtype=torch.int32)),
    "over-seeds": lambda: gumbel_noise(make_keys(list(range(NUM_DRAWS)), [3] * NUM_DRAWS), torch.tensor(5, dtype=torch.int32)),
    "uniforms-over-positions": lambda: draw_uniforms([7] * NUM_DRAWS, list(range(NUM_DRAWS))),
    "uniforms-over-seeds": lambda: draw_uniforms(list(range(NUM_DRAWS)), [3] * NUM_DRAWS),
}


@pytest.mark.parametrize("name", DRAWS)
def test_noise_is_uniform_before_the_logarithms(name: str) -> None:
    assert chi_square(to_uniform(DRAWS[name]().flatten())) < LIMIT


def test_chi_square_sees_a_slightly_bent_distribution() -> None:
    uniform = to_uniform(DRAWS["over-tokens"]().flatten())
    assert chi_square(uniform**1.02) > LIMIT


@pytest.mark.parametrize(
    ("name", "shift"),
    [("over-tokens", 1), ("over-tokens", 256), ("over-positions", 1), ("over-seeds", 1), ("uniforms-over-positions", 1)],
    ids=lambda value: str(value),
)
def test_neighbouring_draws_are_independent(name: str, shift: int) -> None:
    bins = (to_uniform(DRAWS[name]().flatten()) * 8).long()
    pairs = bins[:-shift] * 8 + bins[shift:]
    assert chi_square((pairs + 0.5) / 64) < LIMIT


@pytest.mark.parametrize("first", Stream)
@pytest.mark.parametrize("second", Stream)
def test_streams_are_independent(first: Stream, second: Stream) -> None:
    """Also where one is ahead of the other by a position."""
    draws = [
        (to_uniform(gumbel_noise(make_keys([7] * 2**16, list(range(2**16)), stream), torch.tensor(5, dtype=torch.int32))) * 8).long()
        for stream in (first, second)
    ]
    for pairs in (draws[0] * 8 + draws[1], draws[0][1:] * 8 + draws[1][:-1]):
        is_same = first == second and len(pairs) == 2**16
        assert (chi_square((pairs + 0.5) / 64) > LIMIT) == is_same


def test_pair_test_sees_dependent_draws() -> None:
    bins = (to_uniform(DRAWS["over-tokens"]().flatten()) * 8).long()
    bins[1::20] = bins[0::20][: len(bins[1::20])]  # one draw in twenty repeats its neighbour
    assert chi_square((bins[:-1] * 8 + bins[1:] + 0.5) / 64) > LIMIT


@pytest.mark.parametrize("bounds", [(0, 509), (0, 255), (255, 509), (170, 340), (508, 509)], ids=str)
def test_shard_sees_a_slice_of_the_whole(bounds: tuple[int, int]) -> None:
    start, end = bounds
    keys = make_keys([1, 2, 3], [4, 5, 6])[:, None]
    whole = gumbel_noise(keys, torch.arange(509, dtype=torch.int32))
    assert torch.equal(gumbel_noise(keys, torch.arange(start, end, dtype=torch.int32)), whole[:, start:end])


def test_rows_do_not_depend_on_each_other() -> None:
    together = gumbel_noise(make_keys([9, 8], [1, 2])[:, None], torch.arange(100, dtype=torch.int32))
    alone = gumbel_noise(make_keys([8], [2])[:, None], torch.arange(100, dtype=torch.int32))
    assert torch.equal(together[1:], alone)
    assert not torch.isclose(together[0], together[1]).any()
