"""What ``zspmd-run bench`` makes of samples: quartiles, ratios, noise; and how it shows them."""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable, Sequence

import pytest
from rich.console import Console

from zspmd.runtime.programs.bench.report import Report
from zspmd.runtime.programs.bench.rows import Row, Spread, Value, take_turns
from zspmd.runtime.programs.bench.scale import fit_line
from zspmd.runtime.programs.bench.sizes import read_size, show_size
from zspmd.runtime.programs.bench.table import build_table, format_value

CASE: dict[str, Value] = {"ranks": 2, "payload": "512 B"}


def row(side: str, *turns: list[float], unit: str = "us") -> Row:
    return Row(CASE, side, unit, list(turns))


def shown(report: Report) -> list[str]:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(build_table(report))
    return console.export_text().splitlines()


def test_quartiles_are_of_all_samples_and_of_one_itself() -> None:
    assert row("a", [1.0, 2.0], [3.0, 4.0, 5.0]).spread() == Spread(2.0, 3.0, 4.0)
    assert row("a", [7.0]).spread() == Spread(7.0, 7.0, 7.0)


def test_a_99th_percentile_needs_a_hundred_samples() -> None:
    assert row("a", [1.0] * 99).p99() is None
    assert row("a", [float(number) for number in range(1, 102)]).p99() == pytest.approx(100.0)


def test_a_ratio_is_that_of_neighbouring_turns() -> None:
    """A machine that became three times slower half-way does not change it."""
    ours, raw = row("ours", [2.0], [2.0], [6.0], [6.0]), row("raw", [1.0], [1.0], [3.0], [3.0])
    assert ours.ratio_to(raw) == Spread(2.0, 2.0, 2.0)


def test_sides_with_other_turns_are_compared_by_their_medians() -> None:
    assert row("ours", [2.0], [4.0]).ratio_to(row("raw", [1.5])) == Spread(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("turns", "is_noisy"),
    [
        pytest.param([[10.0], [10.5], [11.0], [10.2]], False, id="close"),
        pytest.param([[10.0], [20.0], [10.0], [20.0]], True, id="apart"),
        pytest.param([[1.0], [20.0]], False, id="too-few-to-say"),
        pytest.param([[1.0, 99.0, 10.0]] * 4, False, id="within-turns"),
    ],
)
def test_a_row_is_noisy_when_its_turns_differ(turns: list[list[float]], is_noisy: bool) -> None:
    assert row("a", *turns).is_noisy is is_noisy


async def test_sides_take_turns_in_alternating_order() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], Awaitable[Sequence[float]]]:
        async def take() -> list[float]:
            order.append(name)
            return [float(len(order))]

        return take

    turns = await take_turns({"a": side("a"), "b": side("b")}, 3)
    assert "".join(order) == "abbaab"
    assert turns == {"a": [[1.0], [4.0], [5.0]], "b": [[2.0], [3.0], [6.0]]}


def test_the_table_has_ratios_and_marks_noise() -> None:
    report = Report("step", baseline="raw")
    for each in (row("ours", [2.0], [4.0], [2.0], [4.0]), row("raw", [2.0], [2.0], [2.0], [2.0])):
        report.add(each)
    header, ours, raw = (line for line in shown(report) if "side" in line or "ours" in line or "raw" in line.split())
    assert header.split() == ["ranks", "payload", "side", "median", "us", "quartiles", "to", "raw", "quartiles"]
    assert ours.split() == ["2", "512", "B", "ours", "3!", "2", "to", "4", "1.50", "1.00", "to", "2.00"]
    assert raw.split() == ["raw", "2", "2", "to", "2"], "a case that goes on is not written again, and the baseline has no ratio"
    assert report.noisy_rows() == [report.rows[0]]


def test_units_stand_with_their_figures_where_there_are_several() -> None:
    report = Report("wire")
    report.add(row("ours", [34.0], unit="B"))
    report.add(row("ours", [2.5]))
    text = "\n".join(shown(report))
    assert "34 B" in text
    assert "2.50 us" in text


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1234"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.0123"), (3.0, "3"), (7, "7"), ("met", "met")]
)
def test_numbers_have_about_three_digits(value: float | str, text: str) -> None:
    assert format_value(value) == text


def test_the_json_has_machine_and_ratios_and_is_plain() -> None:
    report = Report("step", baseline="raw")
    report.add(row("ours", [2.0], [4.0]))
    report.add(row("raw", [1.0], [2.0]))
    report.note("left out: Ray")
    report.note("left out: Ray")
    told = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert told["benchmark"] == "step"
    assert told["notes"] == ["left out: Ray"]
    assert {"processor", "cores", "load_before", "load_after", "python", "versions"} <= told["machine"].keys()
    assert told["machine"]["versions"]["pyzmq"]
    ours, raw = told["rows"]
    assert (ours["case"], ours["side"], ours["median"], ours["turn_medians"]) == (CASE, "ours", 3.0, [2.0, 4.0])
    assert ours["ratio"] == {"lower": 2.0, "median": 2.0, "upper": 2.0}
    assert raw["ratio"] is None


def test_a_line_through_points_on_one_is_that_line() -> None:
    line = fit_line([8.0, 64.0, 1024.0], [30.0 + 2.0 * ranks for ranks in (8, 64, 1024)])
    assert line == pytest.approx((30.0, 2.0, 0.0), abs=1e-9)


@pytest.mark.parametrize(("text", "size"), [("64", 64), ("512B", 512), ("64K", 65536), ("64KB", 65536), ("1M", 1 << 20)])
def test_sizes_are_read_and_shown(text: str, size: int) -> None:
    assert read_size(text) == size
    assert read_size(show_size(size).replace(" ", "")) == size
