"""``zspmd-run [options] COMMAND [args]``: start a launch from the command line.

COMMAND is a script for the ranks (a name with .py or a slash, -m MODULE, or --no-python COMMAND: ``driver.script_launch``), or one of
the modules of ``runtime/programs``, which offer

    add_arguments(parser)             their own arguments
    prepare(arguments, options)       check them before anything starts, and return the model or worker as text for ``--dry-run``
    run(arguments, options)           read what is to be read, and return a coroutine whose result is the exit code

Exit codes: 0 done, 1 to 119 and 128 + N from the rank that failed first (126 and 127: it could not be executed, was not found), 2 wrong
input, 120 the ranks could not be started, 121 the agent of the node is gone, 122 not ready in time, 129, 130 and 143 ended by SIGHUP,
SIGINT and SIGTERM, 141 nobody reads standard output any longer.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import importlib
import os
import pkgutil
import shlex
import signal
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import uvloop

from ...errors import ConfigError, LaunchError, PeerLostError, ReadyTimeoutError, RequestError, WorkerExitedError, ZspmdError
from ...process import child_pids
from ...topology import axis_groups
from ...transport.security import tcp_endpoint
from .launcher_process import ignore_stop_signals, is_output_closed, on_stop_signals, open_standard_streams, orphans_ended
from .option_values import make_log_dir
from .options import LaunchOptions as LaunchOptions
from .options import ScriptOptions, build_parser, ignored_options, is_script, launch_options, script_options, wants_logs
from .plan import LaunchPlan, plan_local
from .ports import first_candidate
from .run_directory import run_directory_path

USAGE_ERROR, START_FAILED, NODE_LOST, NOT_READY = 2, 120, 121, 122
_PROGRAMS = "zspmd.runtime.programs"


class Program(Protocol):
    """A module of ``runtime/programs``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def prepare(self, arguments: argparse.Namespace, options: LaunchOptions) -> str: ...

    def run(self, arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error is one message on stderr."""
    open_standard_streams()
    try:
        arguments = build_parser(_program_names()).parse_args(argv)
        if arguments.command[0] == "--":  # up to Python 3.12 argparse leaves it there
            del arguments.command[0]
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


def exit_code(error: ZspmdError) -> int:
    """Return the exit code that stands for an error; a rank's own code where it is the first cause."""
    if isinstance(error, WorkerExitedError):
        return 128 - error.exit_code if error.exit_code < 0 else max(1, error.exit_code)
    if isinstance(error, ReadyTimeoutError):
        return NOT_READY
    if isinstance(error, LaunchError):
        return START_FAILED
    if isinstance(error, PeerLostError):
        return NODE_LOST
    return USAGE_ERROR if isinstance(error, (ConfigError, RequestError)) else 1


def _main_program(arguments: argparse.Namespace) -> int:
    name, *rest = arguments.command
    program = _find_program(name)
    parser = argparse.ArgumentParser(prog=f"zspmd-run {name}", description=program.__doc__)
    program.add_arguments(parser)
    program_arguments = parser.parse_args(rest)
    options = launch_options(arguments, name)
    described = program.prepare(program_arguments, options)
    if arguments.dry_run:
        print(_describe_program(options, name, described, getattr(program_arguments, "bind", None)))
        return 0
    if options.log_dir is not None:
        make_log_dir(options.log_dir)
    with orphans_ended():
        return int(uvloop.run(_run_until_signal(program.run(program_arguments, options))))


def _main_script(arguments: argparse.Namespace) -> int:
    options = script_options(arguments)
    if arguments.dry_run:
        print(_describe_script(replace(options, log_dir="a new temporary directory") if wants_logs(arguments) else options))
        return 0
    ignored = ignored_options(arguments)
    notes = [f"ignored, since it means nothing on one node: {', '.join(ignored)}"] if ignored else []
    if wants_logs(arguments):
        options = replace(options, log_dir=tempfile.mkdtemp(prefix=f"zspmd-{options.launch_id}-"))
        notes.append(f"log files are in {options.log_dir}")
    elif options.log_dir is not None:
        make_log_dir(options.log_dir)
    for note in [] if options.is_quiet else notes:
        print(f"[zspmd] {note}", file=sys.stderr)
    with orphans_ended():
        return int(uvloop.run(_run_script(options)))


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


# --- plans ---


def _describe_program(options: LaunchOptions, program: str, described: str, bind: str | None) -> str:
    """Return the plan as text: launch, endpoints, ranks and mesh."""
    directory = run_directory_path(options.launch_id)
    plan = plan_local(
        launch_id=options.launch_id,
        world_size=options.parallel.world_size,
        master_port=first_candidate(options.launch_id, "master"),
        run_directory=str(directory),
        devices=options.devices,
    )
    facts = [
        *(f"socket   {f'ipc://{directory}/{name}' if bind is None else tcp_endpoint(bind)}" for name in ("step", "result", "control")),
        *(f"mesh     {axis}: {' '.join(str(list(ranks)) for ranks in axis_groups(options.parallel, axis))}" for axis in ("tp", "pp", "dp")),
    ]
    return _describe_plan(plan, f"program  {program}: {described}", "first candidate", facts)


def _describe_script(options: ScriptOptions) -> str:
    """Return the plan as text: what is executed, where, with which port, threads and variables."""
    from ..driver.script_launch import script_environment, script_plan

    directory = run_directory_path(options.launch_id)
    port = options.master_port or first_candidate(options.launch_id, "master")
    plan = script_plan(options, port, str(directory))
    environment = script_environment(options, plan, 0)
    facts = [
        f"socket   ipc://{directory}/control",
        f"cwd      {options.cwd}",
        f"threads  OMP_NUM_THREADS={environment['OMP_NUM_THREADS']}",
        f"devices  CUDA_VISIBLE_DEVICES={environment.get('CUDA_VISIBLE_DEVICES', '(not set)')}",
        f"env      {' '.join(options.environment) or '(nothing beside this environment and the facts of the launch)'}",
        f"logs     {options.log_dir or '(none)'}",
    ]
    chosen = "as given" if options.master_port else "first candidate"
    return _describe_plan(plan, f"script   {shlex.join(options.argv)}", chosen, facts)


def _describe_plan(plan: LaunchPlan, command: str, chosen: str, facts: Sequence[str]) -> str:
    lines = [
        f"launch   {plan.launch_id}",
        command,
        f"world    {plan.world_size} rank{'s' if plan.world_size > 1 else ''} on {len(plan.hosts)} host",
        f"master   {plan.master_addr}:{plan.master_port} ({chosen})",
        *facts,
    ]
    rows = plan.describe()
    lines.append("         ".join(("", "  ".join(f"{name:<9}" for name in rows[0]))))
    lines += ["rank     " + "  ".join(f"{value:<9}" for value in row.values()) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


# --- running ---


async def _run_script(options: ScriptOptions) -> int:
    from ..driver.script_launch import ScriptLaunch

    launch = ScriptLaunch(options)
    on_stop_signals(launch.interrupt)
    try:
        return await launch.run()
    finally:
        ignore_stop_signals()


async def _run_until_signal(program: Coroutine[Any, Any, int]) -> int:
    """Run a program; SIGINT, SIGTERM and SIGHUP end it and become the exit code 128 + N.

    The first cancels it, so that it can drain. The second has its agents end their ranks by SIGTERM, the third by SIGKILL; either
    way the program still runs to its end, and nothing is left when this returns.
    """
    task = asyncio.ensure_future(program)
    received: list[int] = []

    def end(number: int) -> None:
        received.append(number)
        if len(received) == 1:
            name = signal.Signals(number).name
            print(f"zspmd-run: {name}: ending; a signal more ends the ranks in 2 s, yet another at once", file=sys.stderr, flush=True)
            task.cancel()
            return
        for pid in child_pids():
            os.kill(pid, signal.SIGTERM if len(received) == 2 else signal.SIGQUIT)

    on_stop_signals(end)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
    except ZspmdError as error:
        if len(received) < 2:
            raise
        print(f"zspmd-run: {error}", file=sys.stderr)  # what ending its ranks by force has made of it
    finally:
        ignore_stop_signals()
    print(f"zspmd-run: ended by {signal.Signals(received[0]).name}", file=sys.stderr)
    return 128 + received[0]


if __name__ == "__main__":
    sys.exit(main())
