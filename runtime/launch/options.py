"""The options of ``zspmd-run``: the parser, what a command is to start, and what its launch options mean for programs and for scripts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ... import __version__
from ...config import ParallelConfig
from ...errors import ConfigError, TopologyError
from .devices import detect_devices, script_devices
from .launch_id import check_launch_id, generate_launch_id
from .option_values import (
    ERR,
    OUT,
    read_address,
    read_argv,
    read_num_ranks,
    read_port,
    read_seconds,
    read_shown_ranks,
    read_stream_bits,
    read_variables,
    read_working_directory,
)

GRACE_S = 30.0
ABORT_GRACE_S = 5.0
# torchrun's options that say how its nodes find each other and how it watches them; there is nothing to be said here.
_IGNORED = ("rdzv-backend", "rdzv-endpoint", "rdzv-conf", "local-addr", "role", "monitor-interval", "start-method")
_FOR_SCRIPTS = ("rdzv-id", "master-addr", "master-port", "redirects", "tee", "local-ranks-filter", "no-prefix", "grace", "abort-grace")


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line says about the launch, apart from its program.

    ``given`` names the options, of those that have a default, that were on the command line: for a program that knows better.
    """

    parallel: ParallelConfig
    launch_id: str
    devices: tuple[str, ...]
    log_dir: str | None
    is_quiet: bool
    given: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ScriptOptions:
    """A launch of ranks that execute ``argv``.

    Attributes:
        cwd: where they run.
        devices: "cpu" or "cuda:<index>" by rank; ``visible_devices`` is their CUDA_VISIBLE_DEVICES, None where it stays as it is.
        environment: variables to set in every rank, beside the launch's facts.
        run_id: what ranks find as TORCHELASTIC_RUN_ID.
        master_port: 0 for one that follows from the launch id.
        log_dir: where each rank's streams go, raw; None for nowhere.
        hidden: (rank, "out" or "err") that are not shown.
        grace_s: how long ranks may take to end after a first Ctrl-C.
        abort_grace_s: from SIGTERM to SIGKILL for the other ranks when one has failed.
    """

    argv: tuple[str, ...]
    cwd: str
    world_size: int
    launch_id: str
    devices: tuple[str, ...]
    visible_devices: str | None
    environment: dict[str, str]
    run_id: str
    master_addr: str
    master_port: int
    log_dir: str | None
    hidden: frozenset[tuple[int, str]]
    has_prefix: bool
    grace_s: float
    abort_grace_s: float
    is_quiet: bool


def build_parser(program_names: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of everything up to the script or program; what follows it is ``arguments.command``."""
    parser = argparse.ArgumentParser(
        prog="zspmd-run",
        usage="%(prog)s [options] SCRIPT.py | -m MODULE | --no-python COMMAND | PROGRAM  [its own arguments]",
        description="Start SPMD ranks under supervision: a script as under torchrun, or a program of zspmd.",
        epilog=f"programs: {', '.join(program_names)}; 'zspmd-run PROGRAM --help' shows a program's own arguments",
        allow_abbrev=False,
    )
    _add(parser, "nproc-per-node", "-n", metavar="N", help="ranks: a number, gpu, cpu or auto (1; for programs the product of the axes)")
    _add(parser, "launch-id", metavar="ID", help="a name for this launch, unique while it lives (made up)")
    _add(parser, "devices", default="auto", metavar="LIST", help="auto, cpu, cuda, or one device a rank: cuda:0,cuda:1 (auto)")
    _add(parser, "env", "-x", action="append", default=[], metavar="NAME[=VALUE]", help="set it in every rank; NAME alone copies")
    _add(parser, "log-dir", metavar="DIR", help="write each rank's raw output to DIR/r00000.out and .err")
    _add(parser, "dry-run", action="store_true", help="print the plan and start nothing")
    _add(parser, "quiet", "-q", action="store_true", help="show ranks' lines and errors only")
    parser.add_argument("--version", action="version", version=f"zspmd {__version__}")
    _add(parser.add_argument_group("programs"), "tp", type=int, metavar="N", help="ranks that share each layer (all ranks)")
    _add_script_options(parser.add_argument_group("scripts"))
    _add_torchrun_options(parser.add_argument_group("of torchrun, for one node"))
    parser.add_argument("command", nargs=argparse.PARSER, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def launch_options(arguments: argparse.Namespace, program: str) -> LaunchOptions:
    """Return what the options mean for a program, and put ``--env`` into this process's environment.

    Raises:
        ConfigError: an option that only scripts have, or one that cannot be honoured.
        TopologyError: sizes or devices that do not fit each other.
    """
    _check_one_node(arguments)
    for name in (*_FOR_SCRIPTS, *_IGNORED):
        if getattr(arguments, _dest(name)) not in (None, False):
            raise ConfigError(f"--{name} is for scripts and means nothing for the program {program!r}; leave it out")
    num_ranks, tp = read_num_ranks(arguments.nproc_per_node), arguments.tp
    parallel = ParallelConfig(tp=tp if tp is not None else num_ranks or 1)
    if num_ranks is not None and num_ranks != parallel.world_size:
        raise TopologyError(f"--nproc-per-node {num_ranks} and --tp {tp} do not agree; give one of them, or equal numbers")
    devices = tuple(detect_devices(arguments.devices, parallel.world_size))
    os.environ.update(read_variables(arguments.env))
    values = {"nproc-per-node": num_ranks, "tp": tp, "launch-id": arguments.launch_id}
    given = {name for name, value in values.items() if value is not None} | ({"devices"} if arguments.devices != "auto" else set())
    return LaunchOptions(parallel, _launch_id(arguments), devices, _log_dir(arguments), arguments.quiet, frozenset(given))


def script_options(arguments: argparse.Namespace) -> ScriptOptions:
    """Return what the options mean for a script, module or command.

    Raises:
        ConfigError, TopologyError: an option that only programs have, a bad value, or one that cannot be honoured.
    """
    _check_one_node(arguments)
    if arguments.tp is not None:
        raise ConfigError("--tp is for programs; a script lays out its own mesh, give -n")
    world_size = read_num_ranks(arguments.nproc_per_node) or 1
    devices, visible = script_devices(arguments.devices, world_size)
    environment, launch_id = read_variables(arguments.env), _launch_id(arguments)
    if visible is not None and "CUDA_VISIBLE_DEVICES" in environment:
        raise ConfigError(f"--devices {arguments.devices} sets CUDA_VISIBLE_DEVICES, as does --env; give one of them")
    redirects = read_stream_bits("--redirects", arguments.redirects, world_size)
    tee = read_stream_bits("--tee", arguments.tee, world_size)
    shown = read_shown_ranks(arguments.local_ranks_filter, world_size)
    return ScriptOptions(
        argv=read_argv(arguments.command, is_module=arguments.module, is_command=arguments.no_python),
        cwd=read_working_directory(),
        world_size=world_size,
        launch_id=launch_id,
        devices=tuple(devices),
        visible_devices=visible,
        environment=environment,
        run_id=arguments.rdzv_id or launch_id,
        master_addr=read_address("127.0.0.1" if arguments.master_addr is None else arguments.master_addr),
        master_port=read_port(arguments.master_port),
        log_dir=_log_dir(arguments),
        hidden=frozenset(
            (rank, stream)
            for rank in range(world_size)
            for bit, stream in ((OUT, "out"), (ERR, "err"))
            if rank not in shown or (redirects[rank] & bit and not tee[rank] & bit)
        ),
        has_prefix=world_size > 1 and not arguments.no_prefix,
        grace_s=read_seconds("--grace", arguments.grace, GRACE_S),
        abort_grace_s=read_seconds("--abort-grace", arguments.abort_grace, ABORT_GRACE_S),
        is_quiet=arguments.quiet,
    )


def wants_logs(arguments: argparse.Namespace) -> bool:
    """Say whether ``--redirects`` or ``--tee`` asks for log files without saying where."""
    return arguments.log_dir is None and any(value not in (None, "0") for value in (arguments.redirects, arguments.tee))


def ignored_options(arguments: argparse.Namespace) -> list[str]:
    """Return those of torchrun's options that were given and change nothing."""
    return [f"--{name}" for name in _IGNORED if getattr(arguments, _dest(name)) is not None]


def is_script(arguments: argparse.Namespace) -> bool:
    """Say whether the command is for the ranks themselves rather than a program: -m, --no-python, or a name with .py or a slash."""
    name: str = arguments.command[0]
    return bool(arguments.module or arguments.no_python or name.endswith(".py") or "/" in name)


def _add(parser: argparse._ActionsContainer, name: str, *short: str, **settings: object) -> None:
    """Add an option in both spellings, with dashes and with underscores."""
    spellings = dict.fromkeys((f"--{name}", f"--{_dest(name)}"))
    parser.add_argument(*short, *spellings, dest=_dest(name), **settings)  # type: ignore[arg-type]  # argparse's own keywords


def _add_script_options(group: argparse._ActionsContainer) -> None:
    _add(group, "module", "-m", action="store_true", help="COMMAND is a module, as in python -m")
    _add(group, "no-python", action="store_true", help="COMMAND is executed as it is")
    _add(group, "redirects", "-r", metavar="S", help="streams that go to files only: 0 none, 1 stdout, 2 stderr, 3 both, or rank:S,rank:S")
    group.add_argument("--redirect", dest="redirects", metavar="S", help=argparse.SUPPRESS)
    _add(group, "tee", "-t", metavar="S", help="streams that go to files and are shown, likewise")
    _add(group, "local-ranks-filter", metavar="R,R", help="show the lines of these ranks only (all)")
    _add(group, "no-prefix", action="store_true", help="show lines without [rank N], which a single rank has not anyway")
    _add(group, "master-addr", metavar="ADDR", help="an address of this machine for rank 0's server (127.0.0.1)")
    _add(group, "master-port", type=int, metavar="PORT", help="its port (one that follows from the launch id, and is held)")
    _add(group, "grace", type=float, metavar="S", help=f"seconds that ranks may take to end after a first Ctrl-C ({GRACE_S:g})")
    _add(group, "abort-grace", type=float, metavar="S", help=f"seconds from SIGTERM to SIGKILL after a failure ({ABORT_GRACE_S:g})")


def _add_torchrun_options(group: argparse._ActionsContainer) -> None:
    _add(group, "standalone", action="store_true", help="what happens anyway")
    _add(group, "nnodes", default="1", metavar="N", help="1 or 1:1; several nodes are not there yet")
    _add(group, "node-rank", type=int, default=0, metavar="R", help="0")
    _add(group, "max-restarts", type=int, default=0, metavar="N", help="0; restarts are not there yet")
    _add(group, "rdzv-id", metavar="ID", help="what ranks find as TORCHELASTIC_RUN_ID (the launch id)")
    for name in _IGNORED:
        _add(group, name, metavar="X", help="ignored, with a note")


def _dest(name: str) -> str:
    return name.replace("-", "_")


def _check_one_node(arguments: argparse.Namespace) -> None:
    if arguments.nnodes not in ("1", "1:1"):
        raise ConfigError(f"--nnodes is {arguments.nnodes!r}; zspmd-run starts ranks on one node only: leave it out or give 1")
    if arguments.node_rank != 0:
        raise ConfigError(f"--node-rank is {arguments.node_rank}; zspmd-run starts ranks on one node only, which is 0")
    if arguments.max_restarts != 0:
        raise ConfigError(f"--max-restarts is {arguments.max_restarts}; zspmd-run restarts nothing: leave it out, and run it again by hand")


def _launch_id(arguments: argparse.Namespace) -> str:
    return generate_launch_id() if arguments.launch_id is None else check_launch_id(arguments.launch_id)


def _log_dir(arguments: argparse.Namespace) -> str | None:
    if arguments.log_dir == "":
        raise ConfigError("--log-dir is empty; give a directory, or leave it out")
    return None if arguments.log_dir is None else os.path.abspath(arguments.log_dir)
