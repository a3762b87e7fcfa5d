"""Histograms of durations."""

from __future__ import annotations

import pytest

from zspmd.runtime.driver.statistics import LatencyHistogram


def test_an_empty_histogram_is_zero() -> None:
    histogram = LatencyHistogram()
    assert (histogram.count, histogram.mean_s, histogram.percentile_s(50)) == (0, 0.0, 0.0)


@pytest.mark.parametrize("elapsed_ns", [0, 1000, 3000, 10**6, 10**9, 10**18, (1 << 64) - 1], ids=str)
def test_a_percentile_is_exact_to_a_factor_of_two(elapsed_ns: int) -> None:
    histogram = LatencyHistogram()
    histogram.record_ns(elapsed_ns)
    for percent in (0.1, 50, 100):
        assert elapsed_ns / 1e9 <= histogram.percentile_s(percent) <= max(2 * elapsed_ns / 1e9, 1e-6)
    assert histogram.mean_s == elapsed_ns / 1e9


def test_a_duration_below_zero_counts_as_zero() -> None:
    histogram = LatencyHistogram()
    histogram.record_ns(-5)
    assert (histogram.count, histogram.mean_s, histogram.percentile_s(100)) == (1, 0.0, 1e-6)


def test_percentiles_follow_the_counts() -> None:
    histogram = LatencyHistogram()
    for elapsed_ns in [10_000] * 90 + [10_000_000] * 10:
        histogram.record_ns(elapsed_ns)
    assert histogram.percentile_s(50) == histogram.percentile_s(90) == 16e-6
    assert histogram.percentile_s(91) == histogram.percentile_s(99) == 16384e-6
    assert histogram.count == 100
