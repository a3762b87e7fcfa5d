"""Counters and latency histograms of a worker group."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class LatencyHistogram:
    """Counts durations in buckets of powers of two of a microsecond; percentiles are exact to a factor of two."""

    count: int = 0
    total_ns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * 64)

    def record_ns(self, elapsed_ns: int) -> None:
        """Count one duration, in nanoseconds below 2^64; one below 0, where two clocks disagree by a little, counts as 0."""
        if elapsed_ns < 0:
            elapsed_ns = 0
        self.count += 1
        self.total_ns += elapsed_ns
        self.buckets[(elapsed_ns // 1000).bit_length()] += 1

    @property
    def mean_s(self) -> float:
        return self.total_ns / self.count / 1e9 if self.count else 0.0

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
        replayed_frames: sent again to a rank that had missed them.
        foreign_frames: frames of another launch that were dropped.
        impostor_frames: over TCP, messages that a rank sent in the name of another; they were dropped.
        late_answers: answers to steps and calls whose await had ended.
        round_trip: from the call of ``submit``, once it had room, to the last answer; the sum of the four that follow.
        publish: of it, encoding the inputs.
        transit: from there until the rank that answered last had the step; the host's processes share a clock.
        compute: what that rank took, its encoding of the answer included.
        collect: from there until the driver had the answer.
    """

    steps: int = 0
    calls: int = 0
    sent_bytes: int = 0
    in_flight: int = 0
    replayed_frames: int = 0
    foreign_frames: int = 0
    impostor_frames: int = 0
    late_answers: int = 0
    round_trip: LatencyHistogram = field(default_factory=LatencyHistogram)
    publish: LatencyHistogram = field(default_factory=LatencyHistogram)
    transit: LatencyHistogram = field(default_factory=LatencyHistogram)
    compute: LatencyHistogram = field(default_factory=LatencyHistogram)
    collect: LatencyHistogram = field(default_factory=LatencyHistogram)

    def record(self, asked_ns: int, published_ns: int, received_ns: int, busy_us: int, collected_ns: int) -> None:
        """Count the way of a step or call, whose last answer came at ``collected_ns``; the moments are of the monotonic clock."""
        busy_ns = 1000 * busy_us
        self.round_trip.record_ns(collected_ns - asked_ns)
        self.publish.record_ns(published_ns - asked_ns)
        self.transit.record_ns(received_ns - published_ns)
        self.compute.record_ns(busy_ns)
        self.collect.record_ns(collected_ns - received_ns - busy_ns)


@dataclass(frozen=True)
class RankHealth:
    """What a rank last said of itself.

    ``beat_age_s`` is None before the first beat; ``step_id`` is the step started last and ``done_step_id`` the one done last, -1
    before the first. Of the frames that reached it, ``foreign_frames`` were another launch's and ``duplicate_frames`` had been there
    before: it dropped both. ``gaps`` is how often it missed a frame, which was sent again.
    """

    rank: int
    phase: str
    pid: int | None
    host: str
    step_id: int
    done_step_id: int
    beat_age_s: float | None
    memory_bytes: int
    foreign_frames: int = 0
    duplicate_frames: int = 0
    gaps: int = 0
