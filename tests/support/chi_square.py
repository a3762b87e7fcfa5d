"""Pearson's chi-square test of counts, against a distribution and against other counts."""

from __future__ import annotations

import torch
from torch import Tensor

_FEWEST_EXPECTED = 5.0  # below it, counts are too skewed for the test's approximation


def chi_square_p(counts: Tensor, probabilities: Tensor) -> float:
    """Return the probability that counts drawn from ``probabilities`` lie as far from them as these, or farther.

    Outcomes that are expected fewer than five times are judged together. An impossible outcome that occurred gives 0.

    Args:
        counts: [B]. probabilities: float64 [B], adding up to 1.
    """
    counts, expected = counts.double(), probabilities * counts.sum()
    if counts[probabilities == 0].any():
        return 0.0
    is_rare = expected < _FEWEST_EXPECTED
    seen = torch.cat((counts[~is_rare], counts[is_rare].sum()[None]))
    wanted = torch.cat((expected[~is_rare], expected[is_rare].sum()[None]))
    possible = wanted > 0
    seen, wanted = seen[possible], wanted[possible]
    return _tail(((seen - wanted) ** 2 / wanted).sum(), len(seen) - 1)


def same_source_p(counts: Tensor, others: Tensor) -> float:
    """Return the probability that two lots of draws from one distribution lie as far from each other as these, or farther.

    Outcomes that both together have seen fewer than ten times, so that five are expected of each, are judged together.

    Args:
        counts, others: [B], with equal sums.
    """
    assert counts.sum() == others.sum(), (counts.sum(), others.sum())
    both = torch.stack((counts, others)).double()
    is_rare = both.sum(0) < 2 * _FEWEST_EXPECTED
    both = torch.cat((both[:, ~is_rare], both[:, is_rare].sum(1, keepdim=True)), dim=1)
    both = both[:, both.sum(0) > 0]
    return _tail(((both[0] - both[1]) ** 2 / both.sum(0)).sum(), both.shape[1] - 1)


def _tail(distance: Tensor, freedom: int) -> float:
    assert freedom > 0, f"{freedom + 1} outcome to judge: nothing can be wrong with it"
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), distance / 2))
