"""``zspmd-run [options] COMMAND [args]``: start a launch from the command line.

COMMAND is a script for the ranks (a name with .py or a slash, -m MODULE, or --no-python COMMAND: ``driver.script_launch``), or one of
the modules of ``runtime/programs``, which offer

    add_arguments(parser)             their own arguments
    prepare(arguments, options)       check them before anything starts, and return the model or worker as text for ``--dry-run``
    run(arguments, options)           read what is to be read, and return a coroutine whose result is the exit code
    share_out(described, arguments, options)
                                      optional: what each rank will hold, a row of names and values each, for ``--dry-run``; ``described``
                                      is what ``prepare`` has returned
    USES                              what they have a use for: "hosts" (ranks on other nodes), "calls" (of nodes that call in), "logs"
                                      (log files without being asked), "trace" (a timeline of their steps)

Exit codes: 0 done, 1 to 119 and 128 + N from the rank that failed first (126 and 127: it could not be executed, was not found), 2 wrong
input, 120 the ranks could not be started, 121 a node is lost, or the agent of this one, 122 not ready in time, 124 --timeout has passed,
129, 130 and 143 ended by SIGHUP, SIGINT and SIGTERM, 141 nobody reads standard output any longer. A rank may use all of them itself; the
report (--report) has which it was.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import json
import os
import pkgutil
import shlex
import signal
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import uvloop

from ...errors import ConfigError, ZspmdError
from .command.command_options import ignored_options, is_script, launch_options, script_options, wants_logs
from .command.exit_codes import exit_code
from .command.launcher_process import is_output_closed, open_standard_streams, orphans_ended, run_as_launcher
from .command.log_directory import log_path, open_log_directory
from .command.option_parser import build_parser
from .command.option_values import make_log_dir
from .command.options import LaunchOptions as LaunchOptions
from .command.options import ScriptOptions
from .command.plan_text import describe_program, describe_script, dry_plan, plan_facts
from .command.running import run_node, run_program, run_script

if TYPE_CHECKING:
    from .dial.dial_place import DialPlace

_PROGRAMS = "zspmd.runtime.programs"
_REPORT_NAME = "report.json"
OptionsT = TypeVar("OptionsT", LaunchOptions, ScriptOptions)


class Program(Protocol):
    """A module of ``runtime/programs``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def prepare(self, arguments: argparse.Namespace, options: LaunchOptions) -> str: ...

    def run(self, arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error is one message on stderr."""
    open_standard_streams()
    run_as_launcher()
    try:
        arguments = build_parser(_program_names()).parse_args(argv)
        if arguments.command[0] == "--":  # up to Python 3.12 argparse leaves it there
            del arguments.command[0]
        if arguments.json and not arguments.dry_run:
            raise ConfigError(
                "--json prints the plan of --dry-run and nothing else; programs that print JSON have a --json behind their name"
            )
        return _main_script(arguments) if is_script(arguments) else _main_program(arguments)
    except ZspmdError as error:
        print(f"zspmd-run: {error}", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:
        if not is_output_closed():
            raise
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:  # before the loop that handles signals: nothing has been started
        return 128 + signal.SIGINT


def _main_program(arguments: argparse.Namespace) -> int:
    name, *rest = arguments.command
    program = _find_program(name)
    uses = getattr(program, "USES", ())
    parser = argparse.ArgumentParser(prog=f"zspmd-run {name}", description=program.__doc__)
    program.add_arguments(parser)
    program_arguments = parser.parse_args(rest)
    options = launch_options(arguments, name, takes_hosts="hosts" in uses, takes_calls="calls" in uses, takes_trace="trace" in uses)
    described = program.prepare(program_arguments, options)
    _say(options, options.notes)
    if arguments.dry_run:
        share_out = getattr(program, "share_out", None)
        shares = [] if share_out is None else share_out(described, program_arguments, options)
        text = describe_program(options, name, described, getattr(program_arguments, "bind", None), shares)
        _print_plan(arguments, options, f"{name}: {described}", text, shares)
        return 0
    if options.dial is not None and not options.dial.is_driver:
        return _main_node(options.dial)
    with _logs_kept(options, is_wanted="logs" in uses) as kept, orphans_ended():
        return int(uvloop.run(run_program(program.run(program_arguments, kept), kept)))


def _main_script(arguments: argparse.Namespace) -> int:
    options = script_options(arguments)
    ignored = ignored_options(arguments)
    notes = [f"ignored, since it means nothing here: {', '.join(ignored)}"] if ignored else []
    _say(options, [*options.notes, *notes])
    if arguments.dry_run:
        options = replace(options, log_dir=options.log_dir or str(log_path(options.launch_id)))
        _print_plan(arguments, options, shlex.join(options.argv), describe_script(options))
        return 0
    if options.dial is not None and not options.dial.is_driver:
        return _main_node(options.dial)
    with _logs_kept(options, is_wanted=True) as kept, orphans_ended():
        if wants_logs(arguments) and kept.log_dir is not None:
            _say(options, [f"log files are in {kept.log_dir}"])
        return int(uvloop.run(run_script(kept)))


def _main_node(place: DialPlace) -> int:
    """Serve the command that drives, on another node or in another process."""
    with orphans_ended():
        return int(uvloop.run(run_node(place)))


@contextlib.contextmanager
def _logs_kept(options: OptionsT, *, is_wanted: bool) -> Iterator[OptionsT]:
    """Make the directory for log files: the one that was asked for, or that of this launch among those of the user's launches.

    Without the latter, on a full or read-only disk, the launch goes on.
    """
    if options.log_dir is not None or not is_wanted:
        if options.log_dir is not None:
            make_log_dir(options.log_dir)
        yield options
        return
    directory, why = None, "a launch of this id lives"
    try:
        directory = open_log_directory(options.launch_id)
    except OSError as error:
        why = str(error)
    if directory is None:
        _say(options, [f"no log files are kept: {why}; --log-dir says where"])
        yield options
        return
    with contextlib.closing(directory):
        path = str(directory.path)
        yield replace(options, log_dir=path, launcher_log=directory.launcher_log, report=options.report or os.path.join(path, _REPORT_NAME))


def _print_plan(
    arguments: argparse.Namespace,
    options: LaunchOptions | ScriptOptions,
    command: str,
    text: str,
    shares: Sequence[Mapping[str, object]] = (),
) -> None:
    print(json.dumps(plan_facts(dry_plan(options), options, command, shares), indent=2) if arguments.json else text)


def _say(options: LaunchOptions | ScriptOptions, notes: Sequence[str]) -> None:
    for note in () if options.is_quiet else notes:
        print(f"[zspmd] {note}", file=sys.stderr)


def _program_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "programs")]))


def _find_program(name: str) -> Program:
    names = _program_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        hint = f"; to run the file of that name write ./{name}" if os.path.isfile(name) else hint
        raise ConfigError(f"unknown program {name!r}; programs are {', '.join(names)}{hint}")
    program: Program = importlib.import_module(f"{_PROGRAMS}.{name}")
    return program


if __name__ == "__main__":
    sys.exit(main())
