"""The report of a benchmark: its rows, what it left out, the machine, and how rows compare with the baseline."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .machine import load, machine_facts
from .rows import NOISY_SPREAD, Row, Spread

_FORMAT = 1


@dataclass
class Report:
    """What a benchmark has found out; made by the frame, filled by the benchmark.

    Attributes:
        name: of the benchmark.
        baseline: the side to whose row of the same case and unit the others' ratios are given; None for no ratios.
        x_axis: the column of the cases by which curves are drawn; None for no curves.
        parts: reports of which this one is a summary.
        others: distributions whose versions the figures depend on, beside what zspmd needs.
    """

    name: str
    is_quiet: bool = False
    baseline: str | None = None
    x_axis: str | None = None
    others: Sequence[str] = ()
    title: str = ""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    parts: list[Report] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._load_before = load()
        self._elapsed_s: float | None = None

    def finish(self) -> None:
        """Stop its clock; a report that is written without has been measured until then."""
        self._elapsed_s = time.monotonic() - self._began

    def add(self, row: Row) -> None:
        """Add a row that has samples."""
        self.rows.append(row)

    def note(self, text: str) -> None:
        """Add a line that readers of the figures need: what was left out and why."""
        if text not in self.notes:
            self.notes.append(text)

    def say(self, text: str) -> None:
        """Tell on stderr what is being measured, unless that is to be quiet."""
        if not self.is_quiet:
            print(f"[zspmd] bench {self.name}: {text}", file=sys.stderr, flush=True)

    def ratio(self, row: Row) -> Spread | None:
        """Return the ratio of a row to the baseline's in its case; None where there is none."""
        if self.baseline is None or row.side == self.baseline:
            return None
        found = self.find(row.case, self.baseline, row.unit)
        return None if found is None else row.ratio_to(found)

    def find(self, case: Any, side: str, unit: str) -> Row | None:
        """Return the row of a side in a case."""
        return next((row for row in self.rows if row.case == case and row.side == side and row.unit == unit), None)

    def machine(self) -> dict[str, Any]:
        """Return the facts of the machine, with its load before the first measurement and now."""
        return {**machine_facts(self.others), "load_before": self._load_before, "load_after": load()}

    def noisy_rows(self) -> list[Row]:
        """Return those whose turns differ by more than ``NOISY_SPREAD``."""
        return [row for row in self.rows if row.is_noisy]

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {
            "format": _FORMAT,
            "benchmark": self.name,
            "command": command_line(),
            "elapsed_s": round(time.monotonic() - self._began if self._elapsed_s is None else self._elapsed_s, 3),
            "machine": self.machine(),
            "baseline": self.baseline,
            "noisy_spread": NOISY_SPREAD,
            "rows": [{**row.as_json(), "ratio": _ratio_json(self.ratio(row))} for row in self.rows],
            "notes": self.notes,
            "parts": [part.as_json() for part in self.parts],
        }


def command_line() -> str:
    """Return the command as it can be typed again."""
    return shlex.join(["zspmd-run", *sys.argv[1:]])


def _ratio_json(ratio: Spread | None) -> dict[str, float] | None:
    if ratio is None or math.isnan(ratio.median):
        return None
    return {"lower": ratio.lower, "median": ratio.median, "upper": ratio.upper}
