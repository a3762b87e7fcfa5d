"""Gumbel noise without a generator: a hash of seed, position and token id.

Adding it to logits and taking the largest samples from their softmax. Each value depends on nothing else, so that a sequence's tokens
depend neither on its batch-mates nor on the layout of ranks, and a rank can make the noise of its shard of the vocabulary alone.

    seed, stream, position --splitmix64--> two 32-bit keys of the row;  h = fmix32(fmix32(token ^ key0) ^ key1), as a signed number
    u = (h + 2**31 + 1/2) / 2**32;  noise = -log(-log(u)), from -3.1 to 22.9

One position may need chance for several purposes. Each purpose has its stream: another piece of the seed's splitmix64 sequence, so that
no draw of one stream repeats a draw of another.

splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014. fmix32: the finaliser of MurmurHash3.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Stream(IntEnum):
    """What a draw is for. The first three name Gumbel noise, ACCEPT names ``uniforms``."""

    SAMPLE = 0  # a token from the target's own distribution
    DRAFT = 1  # a token that a draft model proposes, where it must not depend on SAMPLE
    RESIDUAL = 2  # the token after a rejection
    ACCEPT = 3  # whether a draft is accepted


def row_keys(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64], stream: Stream = Stream.SAMPLE) -> npt.NDArray[np.int32]:
    """Return two 32-bit keys for each row, int32 [R, 2].

    Args:
        seeds: uint64 [R], below 2**63.
        positions: int64 [R], index in its sequence of the token that is sampled, below 2**32.
    """
    mixed = _mix(seeds, positions, stream)
    return np.stack((mixed >> np.uint64(32), mixed), axis=1).astype(np.uint32).view(np.int32)  # the high and the low half


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64], stream: Stream) -> npt.NDArray[np.float64]:
    """Return a uniform number for each row, float64 [R], above 0 and below 1: odd multiples of 2**-53. Arguments as of ``row_keys``."""
    # 52 of the 64 bits and a half: with 53, the half would round the largest up to 1.
    drawn: npt.NDArray[np.float64] = ((_mix(seeds, positions, stream) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return drawn


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Return standard Gumbel noise, float64, of the shape that ``keys[..., 0]`` and ``token_ids`` broadcast to.

    Args:
        keys: int32 [..., 2] from ``row_keys``.
        token_ids: int32 [...], ids in the whole vocabulary.
    """
    hashed = _fmix32_(token_ids ^ keys[..., 0])
    hashed = _fmix32_(hashed.bitwise_xor_(keys[..., 1]))
    uniform = hashed.to(torch.float64).add_(2.0**31 + 0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_()


def _mix(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64], stream: Stream) -> npt.NDArray[np.uint64]:
    """Return 64 bits for each row: number ``stream * 2**32 + position`` of the splitmix64 sequence that the seed's hash begins."""
    places = positions.astype(np.uint64) + np.uint64(stream << 32)
    return _splitmix64(_splitmix64(seeds) + places * _GOLDEN)


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _fmix32_(x: Tensor) -> Tensor:
    """Mix int32 values in place. Products wrap; int32 takes half the time of int64 with masks.

    A shift copies the sign bit, which the mask after it takes out again.
    """
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x85EBCA6B - 2**32)
    x.bitwise_xor_((x >> 13).bitwise_and_(0x7FFFF)).mul_(0xC2B2AE35 - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))
