"""``--plot``: how samples are distributed in each case, and curves along the report's axis; as a PNG, or a page with the figure inside."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Sequence
from typing import Any

from .report import Report
from .rows import Row, Value
from .table import build_table

_MAX_PANELS = 24
_COLUMNS = 4
_PANEL_INCHES = (4.2, 3.2)
_STYLE = "body { font: 15px sans-serif; margin: 2em } pre { font-size: 13px } svg { max-width: 100%; height: auto }"


def write_plot(path: str, report: Report, lines: Sequence[str]) -> None:
    """Draw a report.

    Args:
        path: ends with .png or .html.
        lines: about machine and command; a page shows them.
    """
    figure = _draw(report)
    if path.endswith(".png"):
        figure.savefig(path, dpi=110)
        return
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    with open(path, "w") as file:
        file.write(_page(report, svg[svg.index("<svg") :], lines))


def _draw(report: Report) -> Any:
    from matplotlib.figure import Figure

    curves, panels = _curves(report), _distributions(report)
    titles = [*curves, *panels]
    num_columns = max(1, min(_COLUMNS, len(titles)))
    num_lines = max(1, math.ceil(len(titles) / num_columns))
    figure = Figure(figsize=(_PANEL_INCHES[0] * num_columns, _PANEL_INCHES[1] * num_lines + 0.4), layout="constrained")
    figure.suptitle(report.title or f"zspmd bench {report.name}")
    axes = figure.subplots(num_lines, num_columns, squeeze=False).flat
    colours = {side: f"C{number}" for number, side in enumerate(dict.fromkeys(row.side for row in report.rows))}
    for title, panel in zip(titles, axes):
        panel.set_title(title, fontsize=9)
        if title in curves:
            _draw_curve(panel, curves[title], report.x_axis or "", colours)
        else:
            _draw_distribution(panel, panels[title], colours)
    for panel in figure.axes[len(titles) :]:
        panel.set_axis_off()
    return figure


def _curves(report: Report) -> dict[str, list[Row]]:
    """Return, by the rest of the case, the rows that lie along the report's axis; a single point makes no curve."""
    if report.x_axis is None:
        return {}
    grouped: dict[str, list[Row]] = {}
    for row in report.rows:
        if isinstance(row.case.get(report.x_axis), (int, float)):
            rest = {name: value for name, value in row.case.items() if name != report.x_axis}
            grouped.setdefault(f"by {report.x_axis}: {_case_title(rest)} [{row.unit}]", []).append(row)
    return {title: rows for title, rows in grouped.items() if len({row.case[report.x_axis] for row in rows}) > 1}


def _distributions(report: Report) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.p99() is not None:
            grouped.setdefault(f"{_case_title(row.case)} [{row.unit}]", []).append(row)
    return dict(list(grouped.items())[:_MAX_PANELS])


def _case_title(case: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in case.items()) or "all"


def _draw_curve(panel: Any, rows: list[Row], x_axis: str, colours: dict[str, str]) -> None:
    for side in dict.fromkeys(row.side for row in rows):
        points = sorted(((row.case[x_axis], row.spread()) for row in rows if row.side == side), key=lambda point: _number(point[0]))
        xs = [_number(x) for x, _ in points]
        panel.plot(xs, [spread.median for _, spread in points], marker="o", markersize=3, label=side, color=colours[side])
        panel.fill_between(
            xs, [spread.lower for _, spread in points], [spread.upper for _, spread in points], alpha=0.2, color=colours[side]
        )
    ticks = sorted({_number(row.case[x_axis]) for row in rows})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    panel.set_yscale("log")
    panel.set_xlabel(x_axis)
    panel.legend(fontsize=7)


def _draw_distribution(panel: Any, rows: list[Row], colours: dict[str, str]) -> None:
    """Draw for each side which share of its samples was below a value, up to the 99th percentile."""
    shares = list(range(1, 100))
    for row in rows:
        panel.plot([row.quantile(percent) for percent in shares], shares, label=row.side, color=colours[row.side])
    panel.set_xscale("log")
    panel.set_ylabel("% below")
    panel.legend(fontsize=7)


def _number(value: Value) -> float:
    return float(value)


def _page(report: Report, svg: str, lines: Sequence[str]) -> str:
    from rich.console import Console

    console = Console(width=180, file=io.StringIO(), record=True)
    console.print(build_table(report))
    title = html.escape(f"zspmd bench {report.name}")
    table = html.escape(console.export_text())
    about = "\n".join(f"<p>{html.escape(line)}</p>" for line in lines)
    head = f'<head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style></head>'
    return f"<!DOCTYPE html>\n<html>\n{head}\n<body>\n<h1>{title}</h1>\n<pre>{table}</pre>\n{about}\n{svg}\n</body>\n</html>\n"
