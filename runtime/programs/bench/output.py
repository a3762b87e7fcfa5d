"""Showing a report: the table on standard output, ``--json FILE``, ``--plot FILE``; and the options for these."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from ....errors import ConfigError
from .report import Report, command_line
from .table import build_table

PLOT_SUFFIXES = (".png", ".html")
_WIDTH = 180  # of a table that goes to a file
_MAX_TURNS = 100_000


def add_output_options(parser: argparse.ArgumentParser, turns: int | None) -> None:
    """Declare what every benchmark has: where to write, and how often each side is measured where that is asked for."""
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write every figure there too")
    output.add_argument("--plot", metavar="FILE", help="draw distributions and curves: FILE.png or FILE.html (needs zspmd[bench])")
    if turns is not None:
        parser.add_argument("--turns", type=int, default=turns, metavar="N", help=f"how often each side takes its turn ({turns})")


def check_output_options(arguments: argparse.Namespace) -> None:
    """Refuse now what could not be written after minutes of measuring.

    Raises:
        ConfigError: a file that cannot be, a plot without matplotlib, or a number of turns out of bounds.
    """
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path is not None and (not path or os.path.isdir(path) or not os.path.isdir(os.path.dirname(os.path.abspath(path)))):
            raise ConfigError(f"{option} {path!r} cannot be written; give the path of a file in a directory that exists")
    if arguments.plot is not None:
        if not arguments.plot.endswith(PLOT_SUFFIXES):
            raise ConfigError(f"--plot {arguments.plot!r} has no known ending; give FILE.png or FILE.html")
        if find_spec("matplotlib") is None:
            raise ConfigError("--plot needs matplotlib, which is not installed; run: pip install 'zspmd[bench]'")
    turns = getattr(arguments, "turns", 1)
    if not 1 <= turns <= _MAX_TURNS:
        raise ConfigError(f"--turns is {turns}; it must be from 1 to {_MAX_TURNS}")


def show(report: Report) -> None:
    """Print the table, and what has to stand beside it."""
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    console.print(build_table(report))
    for line in describe_surroundings(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def describe_surroundings(report: Report) -> list[str]:
    """Return lines about the machine, the command, and what is to be known of the figures."""
    machine = report.machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, load {machine['load_before']} before and {machine['load_after']} after",
        f"Python {machine['python']}, libzmq {machine['libzmq']}, Linux {machine['kernel']}; {versions}",
        f"command: {command_line()}",
        *(f"note: {note}" for note in report.notes),
    ]
    if noisy := report.noisy_rows():
        lines.append(f"note: {len(noisy)} rows marked ! are noisy: the quartiles of their turns are more than 20 % of the median apart")
    return lines


def write_files(report: Report, arguments: argparse.Namespace) -> None:
    """Write what ``--json`` and ``--plot`` ask for.

    Raises:
        ConfigError: a file cannot be written.
    """
    try:
        if arguments.json is not None:
            _write_json(arguments.json, report.as_json())
        if arguments.plot is not None:
            from .plot import write_plot

            write_plot(arguments.plot, report, describe_surroundings(report))
    except OSError as error:
        raise ConfigError(f"{error.filename!r} cannot be written: {error.strerror}; the table above has the figures") from error


def _write_json(path: str, value: Any) -> None:
    with open(path, "w") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
