"""``zspmd-run [options] PROGRAM [args]``: start a launch from the command line.

PROGRAM is one of the modules of ``runtime/programs``, which offer

    add_arguments(parser)             their own arguments
    prepare(arguments, options)       check them before anything starts, and return the model or worker as text for ``--dry-run``
    run(arguments, options)           read what is to be read, and return a coroutine whose result is the exit code

Exit codes: 0 done, 1 to 119 and 128 + N from the rank that failed first, 2 wrong input, 120 the ranks could not be started, 122 not
ready in time, 129, 130 and 143 ended by SIGHUP, SIGINT and SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import importlib
import pkgutil
import signal
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import uvloop

from ... import __version__
from ...config import ParallelConfig
from ...errors import ConfigError, LaunchError, ReadyTimeoutError, RequestError, TopologyError, WorkerExitedError, ZspmdError
from ...topology import axis_groups
from .devices import detect_devices
from .launch_id import check_launch_id, generate_launch_id
from .plan import plan_local
from .ports import first_candidate
from .run_directory import run_directory_path

USAGE_ERROR, START_FAILED, NOT_READY = 2, 120, 122
_PROGRAMS = "zspmd.runtime.programs"


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line says about the launch, apart from its program."""

    parallel: ParallelConfig
    launch_id: str
    devices: tuple[str, ...]
    log_dir: str | None
    is_quiet: bool


class Program(Protocol):
    """A module of ``runtime/programs``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def prepare(self, arguments: argparse.Namespace, options: LaunchOptions) -> str: ...

    def run(self, arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error is one message on stderr."""
    try:
        arguments = _parser().parse_args(argv)
        program = _find_program(arguments.program)
        parser = argparse.ArgumentParser(prog=f"zspmd-run {arguments.program}", description=program.__doc__)
        program.add_arguments(parser)
        program_arguments = parser.parse_args(arguments.args)
        options = _options(arguments)
        described = program.prepare(program_arguments, options)
        if arguments.dry_run:
            print(_describe_plan(options, arguments.program, described))
            return 0
        return uvloop.run(_run_until_signal(program.run(program_arguments, options)))
    except ZspmdError as error:
        print(f"zspmd-run: {error}", file=sys.stderr)
        return exit_code(error)
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
    return USAGE_ERROR if isinstance(error, (ConfigError, RequestError)) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zspmd-run",
        description="Start SPMD ranks under supervision and run a program on them.",
        epilog=f"programs: {', '.join(_program_names())}; 'zspmd-run PROGRAM --help' shows a program's own arguments",
    )
    parser.add_argument("-n", "--nproc-per-node", type=int, metavar="N", help="ranks on this machine (default: tp)")
    parser.add_argument("--tp", type=int, metavar="N", help="ranks that share each layer (default: all ranks)")
    parser.add_argument("--launch-id", metavar="ID", help="a name for this launch, unique while it lives (default: made up)")
    parser.add_argument("--devices", default="auto", metavar="LIST", help="auto, cpu, cuda, or one device a rank: cuda:0,cuda:1")
    parser.add_argument("--log-dir", metavar="DIR", help="write each rank's raw output to DIR/r00000.out and .err")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    parser.add_argument("-q", "--quiet", action="store_true", help="show ranks' lines and errors only")
    parser.add_argument("--version", action="version", version=f"zspmd {__version__}")
    parser.add_argument("program", metavar="PROGRAM", help="what to run: " + ", ".join(_program_names()))
    parser.add_argument("args", nargs=argparse.REMAINDER, metavar="ARGS", help="the program's own arguments")
    return parser


def _program_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parents[1] / "programs")]))


def _find_program(name: str) -> Program:
    names = _program_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown program {name!r}; programs are {', '.join(names)}{hint}")
    program: Program = importlib.import_module(f"{_PROGRAMS}.{name}")
    return program


def _options(arguments: argparse.Namespace) -> LaunchOptions:
    num_ranks, tp = arguments.nproc_per_node, arguments.tp
    if num_ranks is not None and num_ranks < 1:
        raise TopologyError(f"--nproc-per-node is {num_ranks}; it must be at least 1")
    parallel = ParallelConfig(tp=tp if tp is not None else num_ranks or 1)
    if num_ranks is not None and num_ranks != parallel.world_size:
        raise TopologyError(f"--nproc-per-node {num_ranks} and --tp {tp} do not agree; give one of them, or equal numbers")
    return LaunchOptions(
        parallel=parallel,
        launch_id=generate_launch_id() if arguments.launch_id is None else check_launch_id(arguments.launch_id),
        devices=tuple(detect_devices(arguments.devices, parallel.world_size)),
        log_dir=arguments.log_dir,
        is_quiet=arguments.quiet,
    )


def _describe_plan(options: LaunchOptions, program: str, described: str) -> str:
    """Return the plan as text: launch, endpoints, ranks and mesh."""
    directory = run_directory_path(options.launch_id)
    plan = plan_local(
        launch_id=options.launch_id,
        world_size=options.parallel.world_size,
        master_port=first_candidate(options.launch_id, "master"),
        run_directory=str(directory),
        devices=options.devices,
    )
    lines = [
        f"launch   {plan.launch_id}",
        f"program  {program}: {described}",
        f"world    {plan.world_size} ranks on {len(plan.hosts)} host",
        f"master   {plan.master_addr}:{plan.master_port} (first candidate)",
        *(f"socket   ipc://{directory}/{name}" for name in ("step", "result", "control")),
        *(f"mesh     {axis}: {' '.join(str(list(ranks)) for ranks in axis_groups(options.parallel, axis))}" for axis in ("tp", "pp", "dp")),
    ]
    rows = plan.describe()
    lines.append("         ".join(("", "  ".join(f"{name:<9}" for name in rows[0]))))
    lines += ["rank     " + "  ".join(f"{value:<9}" for value in row.values()) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


async def _run_until_signal(program: Coroutine[Any, Any, int]) -> int:
    """Run a program; SIGINT, SIGTERM and SIGHUP cancel it, which ends its ranks, and become the exit code 128 + N."""
    task = asyncio.ensure_future(program)
    received: list[int] = []

    def cancel(number: int) -> None:
        received.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, cancel, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
    print(f"zspmd-run: ended by {signal.Signals(received[0]).name}", file=sys.stderr)
    return 128 + received[0]


if __name__ == "__main__":
    sys.exit(main())
