"""What is measured: a row for each side in each case, its quartiles, how much its turns differ, and its ratio to another row."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

NOISY_SPREAD = 0.2  # of the turns' medians: their quartiles' distance over their median
_MIN_SAMPLES_OF_P99 = 100
_MIN_TURNS_OF_SPREAD = 4
Value = str | int | float
TakeTurn = Callable[[], Awaitable[Sequence[float]]]


@dataclass(frozen=True)
class Spread:
    """Lower quartile, median and upper quartile."""

    lower: float
    median: float
    upper: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Return those of at least one value."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass
class Row:
    """One side in one case.

    Attributes:
        case: what sets it apart from the other cases of its report, by column: ``{"ranks": 2, "payload": "512 B"}``.
        side: who was measured: "zspmd", "raw pyzmq".
        unit: of the samples: "us", "tokens/s", "B".
        turns: the samples of each turn; a single figure is one turn of one sample.
        facts: further figures of the row, by column.
    """

    case: Mapping[str, Value]
    side: str
    unit: str
    turns: list[list[float]] = field(default_factory=list)
    facts: dict[str, Value] = field(default_factory=dict)

    @property
    def samples(self) -> list[float]:
        """All turns' together."""
        return [sample for turn in self.turns for sample in turn]

    @property
    def medians(self) -> list[float]:
        """Of each turn."""
        return [statistics.median(turn) for turn in self.turns]

    def spread(self) -> Spread:
        """Return the quartiles of all samples."""
        return Spread.of(self.samples)

    def quantile(self, percent: int) -> float:
        """Return a percentile of all samples, 1 to 99."""
        samples = self.samples
        return samples[0] if len(samples) == 1 else statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]

    def p99(self) -> float | None:
        """Return the 99th percentile; None of fewer than 100 samples, which cannot have one."""
        return self.quantile(99) if len(self.samples) >= _MIN_SAMPLES_OF_P99 else None

    def turn_spread(self) -> float | None:
        """Return how much the turns differ: the distance of their medians' quartiles, over their median; None of fewer than four."""
        if len(self.turns) < _MIN_TURNS_OF_SPREAD:
            return None
        of_turns = Spread.of(self.medians)
        return (of_turns.upper - of_turns.lower) / of_turns.median if of_turns.median else 0.0

    @property
    def is_noisy(self) -> bool:
        """Whether its turns differ so much that its figure is worth little."""
        return (self.turn_spread() or 0.0) > NOISY_SPREAD

    def ratio_to(self, other: Row) -> Spread:
        """Return the quartiles of the ratios of this row's turns to those of ``other``, each to the one it took turns with."""
        if len(self.turns) == len(other.turns):
            ratios = [mine / its for mine, its in zip(self.medians, other.medians) if its]
            return Spread.of(ratios or [float("nan")])
        ratio = self.spread().median / other.spread().median if other.spread().median else float("nan")
        return Spread(ratio, ratio, ratio)

    def as_json(self) -> dict[str, Any]:
        """Return everything but the single samples, of whose distribution the percentiles tell."""
        spread = self.spread()
        return {
            "case": dict(self.case),
            "side": self.side,
            "unit": self.unit,
            "samples": len(self.samples),
            "lower": spread.lower,
            "median": spread.median,
            "upper": spread.upper,
            "p99": self.p99(),
            "percentiles": [self.quantile(percent) for percent in range(1, 100)] if self.p99() is not None else [],
            "turn_medians": self.medians,
            "turn_spread": self.turn_spread(),
            "is_noisy": self.is_noisy,
            "facts": self.facts,
        }


async def take_turns(sides: Mapping[Any, TakeTurn], num_turns: int) -> dict[Any, list[list[float]]]:
    """Have each side take ``num_turns`` turns, one after the other, in alternating order; returns the samples of each side's turns."""
    turns: dict[Any, list[list[float]]] = {side: [] for side in sides}
    for number in range(num_turns):
        for side in sides if number % 2 == 0 else reversed(sides):
            turns[side].append(list(await sides[side]()))
    return turns
