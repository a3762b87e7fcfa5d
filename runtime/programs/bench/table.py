"""The rows of a report as a table."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .report import Report
from .rows import Row, Spread, Value

NOISY = "!"


def build_table(report: Report) -> Table:
    """Return one line a row; a case that goes on is not written again."""
    rows = report.rows
    cases, facts = _names(rows, "case"), _names(rows, "facts")
    units = {row.unit for row in rows}
    unit = f" {units.pop()}" if len(units) == 1 else ""
    has_p99 = any(row.p99() is not None for row in rows)
    table = Table(title=report.title or f"bench {report.name}", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (*cases, "side"):
        table.add_column(name, no_wrap=True)
    has_quartiles = any(len(row.samples) > 1 for row in rows)
    for name in (
        f"median{unit}",
        *(["quartiles"] if has_quartiles else []),
        *(["p99"] if has_p99 else []),
        *_ratio_columns(report),
        *facts,
    ):
        table.add_column(name, justify="right", no_wrap=True)
    shown: list[str] = []
    for row in rows:
        case = [format_value(row.case.get(name, "")) for name in cases]
        cells = [*_without_repetition(shown, case), row.side, *_figures(row, has_quartiles, has_p99, has_unit=not unit)]
        table.add_row(*cells, *_ratio_cells(report, row), *(format_value(row.facts.get(name, "")) for name in facts))
        shown = case
    return table


def format_value(value: Value) -> str:
    """Return a number with about three digits, and a text as it is."""
    if not isinstance(value, float) or (value.is_integer() and abs(value) < 1e6):
        return f"{value:.0f}" if isinstance(value, float) else str(value)
    size = abs(value)
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.3g}"


def _names(rows: list[Row], attribute: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in getattr(row, attribute)))


def _without_repetition(before: list[str], case: list[str]) -> list[str]:
    """Blank the leading cells that are those of the row before."""
    same = next((number for number, (old, new) in enumerate(zip(before, case)) if old != new), len(before))
    return ["" if number < same else cell for number, cell in enumerate(case)]


def _figures(row: Row, has_quartiles: bool, has_p99: bool, *, has_unit: bool) -> list[str]:
    spread, p99 = row.spread(), row.p99()
    median = format_value(spread.median) + (f" {row.unit}" if has_unit else "") + (NOISY if row.is_noisy else "")
    quartiles = f"{format_value(spread.lower)} to {format_value(spread.upper)}" if len(row.samples) > 1 else ""
    return [median, *([quartiles] if has_quartiles else []), *([] if not has_p99 else ["" if p99 is None else format_value(p99)])]


def _ratio_columns(report: Report) -> list[str]:
    return [] if report.baseline is None else [f"to {report.baseline}", "quartiles"]


def _ratio_cells(report: Report, row: Row) -> list[str]:
    if report.baseline is None:
        return []
    ratio = report.ratio(row)
    return ["", ""] if ratio is None else [f"{ratio.median:.2f}", _quartiles(ratio)]


def _quartiles(ratio: Spread) -> str:
    return f"{ratio.lower:.2f} to {ratio.upper:.2f}" if ratio.lower != ratio.upper else ""
