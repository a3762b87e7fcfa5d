"""How many ranks a command line asks for, in all and on each node, and how a program's ranks lie on its axes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from ....config import ParallelConfig
from ....errors import ConfigError, TopologyError
from ..hosts.host import Host
from ..plan import place_ranks
from .host_options import num_slots, with_slots
from .option_values import read_count, read_num_ranks

_NUM_RANKS, _PER_NODE = "-n", "--nproc-per-node"


@dataclass(frozen=True)
class RankCounts:
    """Attributes:
    hosts: with the slots that each has by now; None for this machine alone.
    total: ranks in all; None where nobody has said, and with hosts for as many as their GPUs.
    slots: of each node, where the command line says so.
    is_asked: whether the command line says how many in all.
    """

    hosts: tuple[Host, ...] | None
    total: int | None
    slots: int | None
    is_asked: bool


def count_ranks(arguments: argparse.Namespace, hosts: Sequence[Host] | None) -> RankCounts:
    """Return the numbers that ``-n``, ``--nproc-per-node`` and the hosts give.

    Raises:
        TopologyError: a number that cannot be, or more ranks than slots.
    """
    return _count_here(arguments) if hosts is None else _count_on(arguments, hosts)


def read_axes(arguments: argparse.Namespace, counts: RankCounts) -> ParallelConfig:
    """Return a program's mesh; tp takes what the other axes leave.

    Raises:
        TopologyError: sizes that do not agree.
        ConfigError: nobody says how many ranks there are.
    """
    tp, (pp, dp) = arguments.tp, (1 if size is None else size for size in (arguments.pp, arguments.dp))
    is_axis_given = any(size is not None for size in (arguments.tp, arguments.pp, arguments.dp))
    total = counts.total if counts.is_asked or not is_axis_given else None
    if total is None and counts.hosts is not None and not is_axis_given:
        raise ConfigError("nobody says how many ranks there are; give --tp, -n or --nproc-per-node, or slots= in the hostfile")
    if tp is None:
        others = max(1, pp) * max(1, dp)
        if (total or others) % others:
            raise TopologyError(f"{total} ranks cannot be divided by --pp {pp} and --dp {dp}; give --tp, or another number of ranks")
        tp = (total or others) // others
    parallel = ParallelConfig(tp=tp, pp=pp, dp=dp, ep=1 if arguments.ep is None else arguments.ep)
    if counts.is_asked and total is not None and total != parallel.world_size:
        named = f"{_PER_NODE if arguments.num_ranks is None else _NUM_RANKS} {total}"
        axes = " and ".join(f"--{axis} {size}" for axis, size in (("tp", tp), ("pp", pp), ("dp", dp)) if axis == "tp" or size != 1)
        raise TopologyError(f"{named} and {axes} do not agree; give one of them, or equal numbers")
    if counts.hosts is not None and (slots := [host.slots for host in counts.hosts]) and None not in slots:
        place_ranks([host.target for host in counts.hosts], [number or 0 for number in slots], parallel.world_size)
    return parallel


def _count_here(arguments: argparse.Namespace) -> RankCounts:
    total, per_node = read_num_ranks(_NUM_RANKS, arguments.num_ranks), read_num_ranks(_PER_NODE, arguments.nproc_per_node)
    if None not in (total, per_node) and total != per_node:
        raise TopologyError(f"{_NUM_RANKS} {total} and {_PER_NODE} {per_node} do not agree on one node; give one of them, or equal numbers")
    asked = per_node if total is None else total
    return RankCounts(None, asked, None, asked is not None)


def _count_on(arguments: argparse.Namespace, hosts: Sequence[Host]) -> RankCounts:
    slots, placed = None, tuple(hosts)
    if arguments.nproc_per_node == "gpu":
        placed = with_slots(hosts, None)
    elif arguments.nproc_per_node not in (None, "auto"):
        slots = _number(_PER_NODE, arguments.nproc_per_node)
        placed = with_slots(hosts, slots)
    total = None if arguments.num_ranks is None else _number(_NUM_RANKS, arguments.num_ranks)
    available = num_slots(placed)
    if total is not None and available is not None:
        place_ranks([host.target for host in placed], [host.slots or 0 for host in placed], total)
    return RankCounts(placed, available if total is None else total, slots, total is not None)


def _number(option: str, text: str) -> int:
    """Return the number of ranks of several nodes, of which this one knows nothing but what it is told."""
    if text in ("gpu", "cpu", "auto"):
        raise TopologyError(
            f"{option} {text} means this machine, and there are several; give a number, or {_PER_NODE} gpu for the GPUs of each"
        )
    return read_count(option, text)
