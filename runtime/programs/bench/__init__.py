"""Measure zspmd on this machine: steps, collectives, the wire, the engine, starts; ``zspmd-run bench NAME`` runs one benchmark.

Each benchmark is a module of this package, listed in ``_modules``. It offers

    (first line of its docstring)                  what ``bench`` alone lists
    add_arguments(parser)                          its own options; ``--json``, ``--plot`` and ``--turns`` are added to each
    TURNS                                          the default of ``--turns``; without it there is no such option
    TAKES_AXES                                     which of --tp, --pp, --dp, --ep before the word bench it heeds; none if it is missing
    TAKES_HOSTS                                    true where ranks may be on a host of ``zspmd-run --host``; False if it is missing
    prepare(arguments, options) -> str             raise ConfigError for what cannot be, before anything starts; say what will be measured
    measure(arguments, options, report)            a coroutine that adds rows to the report, and notes about what it left out

A row (``rows.Row``) is one side in one case: samples by turn, and further figures. Sides that are compared take turns in one run
(``rows.take_turns``), so that a busy machine slows all of them, and the ratio to the report's ``baseline`` is the median of those of
neighbouring turns. The report prints table, machine and notes, writes ``--json`` and draws ``--plot``; a row whose turns differ much is
marked. What was measured before Ctrl-C or an error is shown too.

Options before the word ``bench`` are about the launch. ``-n N`` there is the same as ``--ranks N`` behind a benchmark that has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Coroutine
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ....errors import ConfigError
from ...launch.command.option_parser import PROGRAM_AXES

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

USES = ("hosts",)


def _modules() -> dict[str, ModuleType]:
    """Return the benchmarks by name; loaded only when asked for, since ranks that are measured import workers from this package."""
    from . import collective, engine, idle, scale, speculation, start, step, targets, wire

    modules = (step, collective, wire, engine, speculation, start, idle, scale, targets)
    return {module.__name__.rpartition(".")[2]: module for module in modules}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmarks and their options."""
    from .output import add_output_options

    parser.description = "Measure zspmd on this machine. 'zspmd-run bench NAME --help' shows the options of one benchmark."
    parser.set_defaults(benchmark=None, overview=parser.format_help)
    names = parser.add_subparsers(dest="benchmark", metavar="NAME", title="benchmarks")
    for name, module in _modules().items():
        summary = (module.__doc__ or "").partition("\n")[0]
        parser_of_one = names.add_parser(name, help=summary, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(parser_of_one)
        add_output_options(parser_of_one, getattr(module, "TURNS", None))


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check what can be checked before a process starts; returns what will be measured."""
    from .output import check_output_options

    if arguments.benchmark is None:
        return "the list of benchmarks"
    module = _modules()[arguments.benchmark]
    if options.hosts is not None and not getattr(module, "TAKES_HOSTS", False):
        raise ConfigError(f"bench {arguments.benchmark} measures this machine alone; leave --host and --hostfile out")
    for axis in PROGRAM_AXES:
        if axis in options.given and axis not in getattr(module, "TAKES_AXES", ()):
            raise ConfigError(f"--{axis} means nothing for bench {arguments.benchmark}; leave it out")
    _take_ranks(arguments, options)
    check_output_options(arguments)
    described = module.prepare(arguments, options)
    return f"{arguments.benchmark}: {described}"


def run(arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]:
    """Return the benchmark as a coroutine."""
    return _list(arguments.overview()) if arguments.benchmark is None else _measure(arguments, options)


async def _list(overview: str) -> int:
    print(overview, end="", flush=True)
    return 0


async def _measure(arguments: argparse.Namespace, options: LaunchOptions) -> int:
    from .output import show, write_files
    from .report import Report

    report = Report(arguments.benchmark, is_quiet=options.is_quiet)
    try:
        await _modules()[arguments.benchmark].measure(arguments, options, report)
    except BaseException:
        report.note("not whole: it ended before its end")
        if report.rows:
            show(report)
            write_files(report, arguments)
        raise
    show(report)
    write_files(report, arguments)
    return 0


def _take_ranks(arguments: argparse.Namespace, options: LaunchOptions) -> None:
    """Have ``-n`` before the word bench mean ``--ranks``."""
    if "num-ranks" not in options.given or not hasattr(arguments, "ranks"):
        return
    if arguments.ranks is not None:
        raise ConfigError(f"-n {options.parallel.world_size} and --ranks are both given; name the numbers of ranks by --ranks alone")
    arguments.ranks = [options.parallel.world_size]
