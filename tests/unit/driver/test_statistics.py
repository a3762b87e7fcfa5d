"""Histograms of durations."""

from __future__ import annotations

import pytest

from zspmd.runtime.driver.statistics import LatencyHistogram


def test_an_empty_histogram_is_zero() -> None:
    histogram = LatencyHistogram()
    assert (histogram.count, histogram.mean_s, histogram.percentile_s(50)) == (0, 0.0, 0.0)


@pytest.mark.parametrize("elapsed_s", [0.0, 1e-6, 3e-6, 0.001, 1.0, 1e9], ids=str)
def test_a_percentile_is_exact_to_a_factor_of_two(elapsed_s: float) -> None:
    histogram = LatencyHistogram()
    histogram.record(elapsed_s)
    for percent in (0.1, 50, 100):
        assert min(elapsed_s, 2.0**39 / 1e6) <= histogram.percentile_s(percent) <= max(2 * elapsed_s, 1e-6)
    assert histogram.mean_s == elapsed_s


def test_percentiles_follow_the_counts() -> None:
    histogram = LatencyHistogram()
    for elapsed_s in [1e-5] * 90 + [1e-2] * 10:
        histogram.record(elapsed_s)
    assert histogram.percentile_s(50) == histogram.percentile_s(90) == 16e-6
    assert histogram.percentile_s(91) == histogram.percentile_s(99) == 16384e-6
    assert histogram.count == 100
