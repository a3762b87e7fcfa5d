"""The parser of ``zspmd-run``'s options: their names, both spellings of each, and what ``--help`` says of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .... import __version__
from ....config import MAX_FANOUT, RELAY_MODES, Deadlines, NodesConfig
from .shown_streams import TAIL_LINES

GRACE_S = 30.0
ABORT_GRACE_S = 5.0
# torchrun's options that say how its nodes find each other and how it watches them; there is nothing to be said here.
IGNORED = ("rdzv-backend", "rdzv-endpoint", "rdzv-conf", "local-addr", "role", "monitor-interval", "start-method")
PROGRAM_AXES = {
    "tp": "ranks that share each layer (what the others leave)",
    "pp": "stages of layers (1)",
    "dp": "replicas (1)",
    "ep": "ranks that share a mixture's experts: tp times the replicas that do, such as dp times tp for all (1: the tp ranks of each)",
}
_HOST_OPTION = (
    "-H is a list of hosts in Open MPI and a hostfile in DeepSpeed, so that it means nothing here: write --host LIST (node1:4,node2:4) or "
    "--hostfile FILE"
)


def build_parser(program_names: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of everything up to the script or program; what follows it is ``arguments.command``."""
    parser = argparse.ArgumentParser(
        prog="zspmd-run",
        usage="%(prog)s [options] SCRIPT.py | -m MODULE | --no-python COMMAND | PROGRAM  [its own arguments]",
        description="Start SPMD ranks under supervision: a script as under torchrun, or a program of zspmd.",
        epilog=f"programs: {', '.join(program_names)}; 'zspmd-run PROGRAM --help' shows a program's own arguments",
        allow_abbrev=False,
    )
    _add_launch_options(parser)
    _add_host_options(parser.add_argument_group("several nodes"))
    _add_manual_options(parser.add_argument_group("several nodes, one command on each; or ranks that are there already"))
    _add_output_options(parser.add_argument_group("output"))
    programs = parser.add_argument_group("programs")
    for axis, meaning in PROGRAM_AXES.items():
        _add(programs, axis, type=int, metavar="N", help=meaning)
    _add_script_options(parser.add_argument_group("scripts"))
    _add_torchrun_options(parser.add_argument_group("of torchrun"))
    parser.add_argument("command", nargs=argparse.PARSER, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def dest(name: str) -> str:
    """Return the attribute of the parsed arguments that has the option of this name."""
    return name.replace("-", "_")


def _add(parser: argparse._ActionsContainer, name: str, *short: str, **settings: object) -> None:
    """Add an option in both spellings, with dashes and with underscores."""
    spellings = dict.fromkeys((f"--{name}", f"--{dest(name)}"))
    parser.add_argument(*short, *spellings, dest=dest(name), **settings)  # type: ignore[arg-type]  # argparse's own keywords


def _add_launch_options(parser: argparse.ArgumentParser) -> None:
    _add(parser, "num-ranks", "-n", metavar="N", help="ranks in all: a number, gpu, cpu or auto (1; for programs the product of the axes)")
    _add(parser, "nproc-per-node", metavar="N", help="ranks on each node, likewise (its slots in the hostfile, else its GPUs, else 1)")
    _add(parser, "launch-id", metavar="ID", help="a name for this launch, unique while it lives (made up)")
    _add(parser, "devices", default="auto", metavar="LIST", help="auto, cpu, cuda, or one device a rank: cuda:0,cuda:1 (auto)")
    _add(
        parser, "env", "-x", action="append", default=[], metavar="NAME[=VALUE]", help="set it in every rank; NAME or 'NAME_*' alone copies"
    )
    _add(parser, "env-file", action="append", default=[], metavar="FILE", help="set what its lines NAME=VALUE say; -x goes above it")
    _add(parser, "timeout", type=float, metavar="S", help="end the launch after so many seconds, with exit code 124 (never)")
    _add(parser, "dry-run", action="store_true", help="print the plan and start nothing, on no node")
    _add(parser, "json", action="store_true", help="print the plan of --dry-run as JSON")
    parser.add_argument("--version", action="version", version=f"zspmd {__version__}")


def _add_host_options(group: argparse._ActionsContainer) -> None:
    default = NodesConfig()
    _add(group, "hostfile", "-f", metavar="FILE", help="hosts, one a line, such as 'node1 slots=4'; - reads standard input")
    _add(group, "host", metavar="LIST", help="hosts in the command itself: node1:4,lee@node2,[2001:db8::1]:2,n[1-8]")
    _add(group, "nnodes", metavar="N", help="the first N of the hosts (all)")
    _add(group, "include", metavar="SPEC", help="these hosts, or slots of them, alone: node1@node2:0,2")
    _add(group, "exclude", metavar="SPEC", help="not these, in the same notation")
    _add(group, "iface", metavar="NAME|NET", help="the interface for data, by name or as 10.0.0.0/8 (found, and proved)")
    _add(group, "rsh", default=default.rsh, metavar="COMMAND", help="what starts a program on a node: COMMAND HOST LINE (ssh)")
    _add(group, "ssh-port", type=int, metavar="PORT", help="of sshd, where the hostfile has no port= (ssh's own)")
    _add(group, "ssh-opt", action="append", default=[], metavar="OPT", help="an argument for the command, as in --ssh-opt=-oUser=lee")
    _add(group, "remote-python", metavar="PATH", help="the interpreter on the other nodes (the path of this one)")
    _add(
        group,
        "fanout",
        type=int,
        default=default.fanout,
        metavar="N",
        help=f"agents started at once, up to {MAX_FANOUT} ({default.fanout})",
    )
    _add(group, "relay", default=default.relay, choices=RELAY_MODES, help="whether one copy of a step goes to each node (auto)")
    _add(
        group,
        "node-timeout",
        type=float,
        metavar="S",
        help=f"a node that is silent for so long is lost, and ends its ranks ({Deadlines.lease_s:g})",
    )
    _add(group, "no-preflight", action="store_true", help="compare nothing and try no connection before ranks start")
    _add(group, "allow-same-host", action="store_true", help="two entries may be one machine")
    group.add_argument("-H", action=_RefusedOption, nargs="?", const=_HOST_OPTION, help=argparse.SUPPRESS)


def _add_manual_options(group: argparse._ActionsContainer) -> None:
    _add(group, "node-rank", type=int, metavar="K", help="with --nnodes and without hosts: which node this is; give all --master-addr")
    _add(group, "master-addr", metavar="ADDR", help="an address of node 0, for rank 0's server (127.0.0.1)")
    _add(group, "master-port", type=int, metavar="PORT", help="its port, or that at which nodes call (follows from the launch id)")
    _add(group, "secret-file", metavar="FILE", help="the secret by which nodes know each other, in a file of mode 0600")
    _add(group, "external", action="store_true", help="this process is a rank of torchrun, srun or mpirun: join the others")


def _add_output_options(group: argparse._ActionsContainer) -> None:
    _add(group, "log-dir", metavar="DIR", help="write each rank's raw output to DIR/r00000.out and .err ($XDG_STATE_HOME/zspmd/ID)")
    _add(
        group,
        "console",
        default="all",
        metavar="WHICH",
        help="whose lines are shown: all, none, a list as 0,4-7, or failed: when it has (all)",
    )
    _add(group, "prefix", default="auto", choices=("auto", "none"), help="[rank N] before each line, [N@HOST] on several nodes (auto)")
    _add(group, "no-prefix", action="store_true", help="--prefix none")
    _add(group, "timestamps", action="store_true", help="seconds since the start before each line")
    _add(group, "tail", type=int, default=TAIL_LINES, metavar="N", help=f"lines shown of a rank that has failed ({TAIL_LINES})")
    _add(group, "trace", metavar="FILE", help="of programs: write the timeline of driver and ranks to FILE, for ui.perfetto.dev")
    _add(group, "report", metavar="FILE", help="write how the launch ended to FILE, as JSON (report.json beside the logs)")
    _add(group, "quiet", "-q", action="store_true", help="show ranks' lines and errors only")
    _add(group, "verbose", "-v", action="store_true", help="tell too how nodes are reached, and what their logins print")


def _add_script_options(group: argparse._ActionsContainer) -> None:
    _add(group, "module", "-m", action="store_true", help="COMMAND is a module, as in python -m")
    _add(group, "no-python", action="store_true", help="COMMAND is executed as it is")
    _add(group, "redirects", "-r", metavar="S", help="streams that go to files only: 0 none, 1 stdout, 2 stderr, 3 both, or rank:S,rank:S")
    group.add_argument("--redirect", dest="redirects", metavar="S", help=argparse.SUPPRESS)
    _add(group, "tee", "-t", metavar="S", help="streams that go to files and are shown, likewise")
    _add(group, "local-ranks-filter", metavar="R,R", help="show the lines of these ranks only (all)")
    _add(group, "grace", type=float, metavar="S", help=f"seconds that ranks may take to end after a first Ctrl-C ({GRACE_S:g})")
    _add(group, "abort-grace", type=float, metavar="S", help=f"seconds from SIGTERM to SIGKILL after a failure ({ABORT_GRACE_S:g})")


def _add_torchrun_options(group: argparse._ActionsContainer) -> None:
    _add(group, "standalone", action="store_true", help="what happens anyway")
    _add(group, "max-restarts", type=int, default=0, metavar="N", help="0; restarts are not there yet")
    _add(group, "rdzv-id", metavar="ID", help="what ranks find as TORCHELASTIC_RUN_ID (the launch id)")
    for name in IGNORED:
        _add(group, name, metavar="X", help="ignored, with a note")


class _RefusedOption(argparse.Action):
    """An option that people know from elsewhere and that would mean another thing to each of them; ``const`` says so."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> None:
        parser.error(str(self.const))
