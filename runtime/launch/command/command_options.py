"""From the arguments of ``zspmd-run`` to the launch that they ask for, of a program or of a script; every contradiction is an error."""

from __future__ import annotations

import argparse
import os

from ....config import Deadlines
from ....errors import ConfigError
from ..devices import detect_devices, script_devices
from ..launch_id import check_launch_id, generate_launch_id
from .host_options import HostChoice, choose_hosts, forwarded_names, read_manual, read_nodes
from .option_parser import ABORT_GRACE_S, GRACE_S, IGNORED, PROGRAM_AXES, dest
from .option_values import read_address, read_argv, read_port, read_seconds, read_tail, read_working_directory
from .options import LaunchOptions, ScriptOptions
from .place_options import count_called, read_place
from .rank_counts import RankCounts, count_ranks, read_axes
from .shown_streams import ShownStreams
from .variables import read_env_files, read_variables

HERE = "127.0.0.1"
_FOR_SCRIPTS = (
    *("rdzv-id", "redirects", "tee", "local-ranks-filter", "no-prefix", "grace", "abort-grace"),
    "timestamps",
)
_FOR_HOSTS = ("hostfile", "host", "include", "exclude")
_CALLS = ("node-rank", "external")
# Of a program they tell only where nodes that call in find each other.
_FOR_CALLS = ("master-addr", "master-port", "secret-file")


def launch_options(
    arguments: argparse.Namespace, program: str, *, takes_hosts: bool = True, takes_calls: bool = True, takes_trace: bool = True
) -> LaunchOptions:
    """Return what the options mean for a program, and put ``--env`` into this process's environment.

    Args:
        takes_hosts: whether the program's ranks may be on other nodes; ``takes_calls``: whether these may call in; ``takes_trace``:
            whether it has steps that a trace could show.

    Raises:
        ConfigError: an option that only scripts have, or one that cannot be honoured.
        TopologyError: sizes or devices that do not fit each other.
    """
    _check_restarts(arguments)
    for name in (*_FOR_SCRIPTS, *IGNORED):
        if getattr(arguments, dest(name)) not in (None, False):
            raise ConfigError(f"--{name} is for scripts and means nothing for the program {program!r}; leave it out")
    if arguments.trace is not None and not takes_trace:
        raise ConfigError(f"--trace means nothing for the program {program!r}, which has no timeline of steps; leave it out")
    variables = _variables(arguments)
    if not takes_calls:
        _check_no_calls(arguments, program)
    choice = choose_hosts(arguments) if takes_hosts else _no_hosts(arguments, program)
    counts = count_ranks(arguments, choice.hosts)
    place = None if arguments.dry_run else read_place(arguments, read_manual(arguments), counts)
    if place is None:
        _check_unused(arguments, program)
    counts = count_called(arguments, place, counts)
    parallel = read_axes(arguments, counts)
    is_here = counts.hosts is None and place is None
    devices = tuple(detect_devices(arguments.devices, parallel.world_size)) if is_here else ()
    shown = _shown(arguments, parallel.world_size)
    os.environ.update(variables)
    return LaunchOptions(
        parallel=parallel,
        launch_id=_launch_id(arguments) if place is None else place.launch_id,
        devices=devices,
        log_dir=_log_dir(arguments),
        is_quiet=arguments.quiet,
        given=_given(arguments, counts),
        device_spec=arguments.devices,
        hosts=counts.hosts,
        nodes=read_nodes(arguments, forwarded_names(arguments.env, variables)),
        lease_s=read_seconds("--node-timeout", arguments.node_timeout, Deadlines.lease_s),
        report=_report(arguments),
        trace=None if arguments.trace is None else os.path.abspath(arguments.trace),
        timeout_s=read_seconds("--timeout", arguments.timeout, 0.0),
        tail=read_tail(arguments.tail),
        has_prefix=arguments.prefix != "none",
        shown=shown,
        is_verbose=arguments.verbose,
        notes=choice.notes,
        dial=place,
        is_dry=arguments.dry_run,
    )


def script_options(arguments: argparse.Namespace) -> ScriptOptions:
    """Return what the options mean for a script, module or command.

    Raises:
        ConfigError, TopologyError: an option that only programs have, a bad value, or one that cannot be honoured.
    """
    _check_restarts(arguments)
    for axis in PROGRAM_AXES:
        if getattr(arguments, axis) is not None:
            raise ConfigError(f"--{axis} is for programs; a script lays out its own mesh, give -n")
    if arguments.trace is not None:
        raise ConfigError(
            "--trace shows the steps that a driver publishes, and a script has none: give it to a program such as generate, or "
            "trace=FILE to zspmd.launch() in the script; torch.profiler shows what a rank's own code does"
        )
    choice, manual = choose_hosts(arguments), read_manual(arguments)
    counts = count_ranks(arguments, choice.hosts)
    place = None if arguments.dry_run else read_place(arguments, manual, counts)
    world_size = counts.total or (None if counts.hosts is not None else 1)
    if place is not None:
        world_size = place.num_nodes if arguments.external else None
    devices, visible = _script_devices(arguments.devices, world_size, counts)
    environment, launch_id = _variables(arguments), _launch_id(arguments) if place is None else place.launch_id
    if visible is not None and "CUDA_VISIBLE_DEVICES" in environment:
        raise ConfigError(f"--devices {arguments.devices} sets CUDA_VISIBLE_DEVICES, as does --env; give one of them")
    is_here = counts.hosts is None and manual is None
    return ScriptOptions(
        argv=read_argv(arguments.command, is_module=arguments.module, is_command=arguments.no_python),
        cwd=read_working_directory(),
        script="" if arguments.module or arguments.no_python else os.path.abspath(arguments.command[0]),
        world_size=world_size,
        launch_id=launch_id,
        is_launch_id_given=arguments.launch_id is not None,
        devices=devices,
        device_spec=arguments.devices,
        visible_devices=visible,
        environment=environment,
        run_id=arguments.rdzv_id or launch_id,
        master_addr=_master_addr(arguments, HERE if is_here else "") if place is None else "",
        master_port=read_port(arguments.master_port) if place is None else 0,
        log_dir=_log_dir(arguments),
        shown=_shown(arguments, world_size),
        has_prefix=not arguments.no_prefix and arguments.prefix != "none" and (world_size != 1 or manual is not None),
        has_timestamps=arguments.timestamps,
        tail=read_tail(arguments.tail),
        grace_s=read_seconds("--grace", arguments.grace, GRACE_S),
        abort_grace_s=read_seconds("--abort-grace", arguments.abort_grace, ABORT_GRACE_S),
        timeout_s=read_seconds("--timeout", arguments.timeout, 0.0),
        is_quiet=arguments.quiet,
        is_verbose=arguments.verbose,
        hosts=counts.hosts,
        slots=counts.slots,
        nodes=read_nodes(arguments, forwarded_names(arguments.env, environment)),
        lease_s=read_seconds("--node-timeout", arguments.node_timeout, Deadlines.lease_s),
        manual=manual,
        is_external=arguments.external,
        report=_report(arguments),
        notes=choice.notes,
        dial=place,
    )


def wants_logs(arguments: argparse.Namespace) -> bool:
    """Say whether ``--redirects`` or ``--tee`` asks for log files without saying where."""
    return arguments.log_dir is None and any(value not in (None, "0") for value in (arguments.redirects, arguments.tee))


def ignored_options(arguments: argparse.Namespace) -> list[str]:
    """Return those of torchrun's options that were given and change nothing."""
    return [f"--{name}" for name in IGNORED if getattr(arguments, dest(name)) is not None]


def is_script(arguments: argparse.Namespace) -> bool:
    """Say whether the command is for the ranks themselves rather than a program: -m, --no-python, or a name with .py or a slash."""
    name: str = arguments.command[0]
    return bool(arguments.module or arguments.no_python or name.endswith(".py") or "/" in name)


def _script_devices(text: str, world_size: int | None, counts: RankCounts) -> tuple[tuple[str, ...], str | None]:
    """Return the devices and CUDA_VISIBLE_DEVICES of ranks here; of those on other nodes what can be said without asking them."""
    if counts.hosts is None:
        devices, visible = script_devices(text, world_size or 1)
        return tuple(devices), visible
    if text not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--devices {text} lists devices of one machine, and there are several; give devices= in the hostfile")
    return (), "" if text == "cpu" else None


def _check_unused(arguments: argparse.Namespace, program: str) -> None:
    for name in _FOR_CALLS:
        if getattr(arguments, dest(name)) is not None:
            raise ConfigError(
                f"--{name} is for scripts, or with --node-rank or --external, and means nothing for {program!r} here; leave it out"
            )


def _check_restarts(arguments: argparse.Namespace) -> None:
    if arguments.max_restarts != 0:
        raise ConfigError(f"--max-restarts is {arguments.max_restarts}; zspmd-run restarts nothing: leave it out, and run it again by hand")


def _check_no_calls(arguments: argparse.Namespace, program: str) -> None:
    for name in _CALLS:
        if getattr(arguments, dest(name)) not in (None, False):
            raise ConfigError(f"--{name} means nothing for the program {program!r}, which one command starts; leave it out")


def _no_hosts(arguments: argparse.Namespace, program: str) -> HostChoice:
    for name in _FOR_HOSTS:
        if getattr(arguments, dest(name)) is not None:
            raise ConfigError(f"--{name} means nothing for the program {program!r}, which runs on this machine alone; leave it out")
    return HostChoice()


def _variables(arguments: argparse.Namespace) -> dict[str, str]:
    return {**read_env_files(arguments.env_file), **read_variables(arguments.env)}


def _shown(arguments: argparse.Namespace, world_size: int | None) -> ShownStreams:
    shown = ShownStreams(arguments.console, arguments.local_ranks_filter, arguments.redirects, arguments.tee)
    shown.check(world_size)
    return shown


def _given(arguments: argparse.Namespace, counts: RankCounts) -> frozenset[str]:
    values = {"num-ranks": counts.total if counts.is_asked else None, "launch-id": arguments.launch_id}
    values |= {axis: getattr(arguments, axis) for axis in PROGRAM_AXES}
    given = {name for name, value in values.items() if value is not None}
    return frozenset(given | ({"devices"} if arguments.devices != "auto" else set()))


def _master_addr(arguments: argparse.Namespace, default: str) -> str:
    if arguments.master_addr is None:
        return default
    return read_address(arguments.master_addr)


def _launch_id(arguments: argparse.Namespace) -> str:
    return generate_launch_id() if arguments.launch_id is None else check_launch_id(arguments.launch_id)


def _log_dir(arguments: argparse.Namespace) -> str | None:
    if arguments.log_dir == "":
        raise ConfigError("--log-dir is empty; give a directory, or leave it out")
    return None if arguments.log_dir is None else os.path.abspath(arguments.log_dir)


def _report(arguments: argparse.Namespace) -> str | None:
    """Return the path of the report; that its directory is missing is said now, not at the end of a long launch."""
    if arguments.report is None:
        return None
    path = os.path.abspath(str(arguments.report))
    if not arguments.report or os.path.isdir(path) or not os.path.isdir(os.path.dirname(path)):
        raise ConfigError(f"--report {arguments.report!r} cannot be written; give the path of a file in a directory that exists")
    return path
