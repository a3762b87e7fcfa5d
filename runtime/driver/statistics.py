"""Counters and latency histograms of a worker group."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LatencyHistogram:
    """Counts durations in buckets of powers of two of a microsecond; percentiles are exact to a factor of two."""

    count: int = 0
    total_s: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * 40)

    def record(self, elapsed_s: float) -> None:
        self.count += 1
        self.total_s += elapsed_s
        self.buckets[min(int(elapsed_s * 1e6).bit_length(), len(self.buckets) - 1)] += 1

    @property
    def mean_s(self) -> float:
        return self.total_s / self.count if self.count else 0.0

    def percentile_s(self, percent: float) -> float:
        """Return the upper edge, in seconds, of the bucket that holds the percentile; 0 without records."""
        wanted, seen = self.count * percent / 100, 0
        for exponent, count in enumerate(self.buckets):
            seen += count
            if count and seen >= wanted:
                return float(1 << exponent) / 1e6
        return 0.0


@dataclass
class GroupStatistics:
    """What a group has done so far.

    Attributes:
        steps, calls: published.
        sent_bytes: of the step socket, each frame counted once whatever the number of ranks.
        in_flight: frames not yet acknowledged by every rank.
        foreign_frames: frames of another launch that were dropped.
        late_answers: answers to steps and calls whose await had ended.
        round_trip: from publication to the last answer.
        busy: what the rank that answered last reported for its part, by step or call.
    """

    steps: int = 0
    calls: int = 0
    sent_bytes: int = 0
    in_flight: int = 0
    foreign_frames: int = 0
    late_answers: int = 0
    round_trip: LatencyHistogram = field(default_factory=LatencyHistogram)
    busy: LatencyHistogram = field(default_factory=LatencyHistogram)


@dataclass(frozen=True)
class RankHealth:
    """What a rank last said of itself.

    ``beat_age_s`` is None before the first beat; ``step_id`` is the step started last, -1 before the first.
    """

    rank: int
    phase: str
    pid: int | None
    host: str
    step_id: int
    beat_age_s: float | None
    memory_bytes: int
