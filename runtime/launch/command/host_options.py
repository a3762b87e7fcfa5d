"""The options of ``zspmd-run`` that say on which machines ranks run, and how these are reached."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ....config import NodesConfig
from ....errors import ConfigError, TopologyError
from .option_values import read_port
from .variables import is_pattern

if TYPE_CHECKING:
    from ..hosts.host import Host

_NNODES = re.compile(r"([0-9]{1,6})(?::([0-9]{1,6}))?", re.ASCII)
# How many processes another launcher has started beside this one; with more than one, each of them would start the launch.
_FOREIGN_SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "WORLD_SIZE")
_NEEDS_HOSTS = ("include", "exclude")


@dataclass(frozen=True)
class ManualNode:
    """One node of a launch whose nodes are started by hand, with one command each: torchrun's way.

    Attributes:
        master_addr: an address or name of node 0; ``master_port`` is 0 for one that follows from the launch id.
        secret_file: None for the secret in the environment, or for nodes on one machine.
    """

    node_rank: int
    num_nodes: int
    master_addr: str
    master_port: int
    secret_file: str | None


@dataclass(frozen=True)
class HostChoice:
    """The machines of a launch: ``hosts``, or None for this one alone; ``notes`` say what was chosen where nobody has said so."""

    hosts: tuple[Host, ...] | None = None
    notes: tuple[str, ...] = ()


def read_nodes(arguments: argparse.Namespace, forwarded: Sequence[str] = ()) -> NodesConfig:
    """Return how other nodes are reached. The selection of hosts is not in it: ``choose_hosts`` has made it.

    Args:
        forwarded: names of variables that travel beside the usual ones.
    """
    return NodesConfig(
        rsh=arguments.rsh,
        ssh_port=arguments.ssh_port,
        ssh_options=tuple(word for option in arguments.ssh_opt for word in _split("--ssh-opt", option)),
        python=arguments.remote_python,
        iface=arguments.iface,
        relay=arguments.relay,
        environment=tuple(forwarded),
        fanout=arguments.fanout,
        is_preflight=not arguments.no_preflight,
        allow_same_host=arguments.allow_same_host,
    )


def choose_hosts(arguments: argparse.Namespace, environment: Mapping[str, str] | None = None) -> HostChoice:
    """Return the hosts that the options name, or else those of the batch system's job that this process is in.

    Raises:
        HostfileError: a file or list that cannot be read: all its bad lines.
        ConfigError, TopologyError: options that contradict each other, or more nodes than hosts.
    """
    if arguments.hostfile is not None and arguments.host is not None:
        raise ConfigError("--hostfile and --host are both given; give one of them, and choose among its hosts by --include")
    notes: list[str] = []
    hosts, num_nodes = _named_hosts(arguments, notes), read_num_nodes(arguments)
    if hosts is not None and arguments.external:
        raise ConfigError(
            "--external joins ranks that another launcher has started, on hosts of its choice; leave --hostfile and --host out"
        )
    is_elsewhere = arguments.external or arguments.standalone or num_nodes == 1 or read_manual(arguments) is not None
    if hosts is None and not is_elsewhere:
        hosts = _allocated_hosts(os.environ if environment is None else environment, notes)
    if hosts is None:
        _check_no_hosts(arguments)
        return HostChoice()
    from ..hosts.host_selection import select_hosts

    if arguments.node_rank is not None:
        raise ConfigError("--node-rank is for one command a node, and this one command starts all hosts; leave it or the hosts out")
    chosen = select_hosts(hosts, include=arguments.include, exclude=arguments.exclude, num_nodes=num_nodes)
    return HostChoice(tuple(chosen), tuple(notes))


def read_num_nodes(arguments: argparse.Namespace) -> int | None:
    """Return the number that ``--nnodes`` gives; torchrun's MIN:MAX only where both are the same."""
    if arguments.nnodes is None:
        return None
    found = _NNODES.fullmatch(arguments.nnodes)
    if found is None or not int(found[1]):
        raise ConfigError(f"--nnodes is {arguments.nnodes!r}; give a whole number of at least 1")
    if int(found[2] or found[1]) != int(found[1]):
        raise ConfigError(f"--nnodes is {arguments.nnodes!r}; zspmd-run starts as many nodes as it is told: give one number")
    return int(found[1])


def read_manual(arguments: argparse.Namespace) -> ManualNode | None:
    """Return the place of this node where its command is one of several, as ``--node-rank`` and ``--nnodes`` say; None otherwise.

    Raises:
        ConfigError: a part is missing, or contradicts another.
    """
    num_nodes, node_rank = read_num_nodes(arguments) or 1, arguments.node_rank
    if arguments.hostfile is not None or arguments.host is not None or (num_nodes == 1 and not node_rank):
        return None
    if node_rank is None or arguments.external:
        return None
    if not 0 <= node_rank < num_nodes:
        raise ConfigError(f"--node-rank is {node_rank} and --nnodes {num_nodes}; nodes count from 0 to {num_nodes - 1}")
    if not arguments.master_addr:
        raise ConfigError("--node-rank needs --master-addr: give each node's command the same address of node 0")
    return ManualNode(node_rank, num_nodes, arguments.master_addr, read_port(arguments.master_port), arguments.secret_file)


def with_slots(hosts: Sequence[Host], num_ranks: int | None) -> tuple[Host, ...]:
    """Return the hosts with this many slots each; None leaves them to the GPUs of each node.

    Raises:
        TopologyError: more than the hostfile gives one of them.
    """
    if num_ranks is None:
        return tuple(replace(host, slots=None) for host in hosts)
    for host in hosts:
        if host.slots is not None and host.slots < num_ranks:
            raise TopologyError(
                f"--nproc-per-node is {num_ranks}, and {host.where or 'the list'} gives {host.name} {host.slots} slots; raise its slots="
            )
    return tuple(replace(host, slots=num_ranks, devices=host.devices and host.devices[:num_ranks]) for host in hosts)


def num_slots(hosts: Sequence[Host]) -> int | None:
    """Return how many slots hosts have together; None where one does not say."""
    slots = [host.slots for host in hosts]
    return None if None in slots else sum(number or 0 for number in slots)


def forwarded_names(entries: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """Return what ranks of other nodes are to get beside the usual variables: patterns as they are, and all names that are set."""
    return [*(entry for entry in entries if is_pattern(entry)), *variables]


def _named_hosts(arguments: argparse.Namespace, notes: list[str]) -> list[Host] | None:
    if arguments.hostfile is not None:
        from ..hosts.hostfile import read_hostfile

        return read_hostfile(arguments.hostfile, notes)
    if arguments.host is not None:
        from ..hosts.host_lists import parse_host_list

        return parse_host_list(arguments.host, notes)
    return None


def _allocated_hosts(environment: Mapping[str, str], notes: list[str]) -> list[Host] | None:
    """Return the hosts of a batch system's job, where it has several and this process is not one of several itself."""
    if any(environment.get(name, "1") != "1" for name in _FOREIGN_SIZES):
        return None
    from ..hosts.host_lists import allocation_hosts

    hosts = allocation_hosts(environment, notes)
    if hosts is None or len(hosts) < 2:
        notes.clear()
        return None
    notes.insert(0, f"runs on the {len(hosts)} hosts of {hosts[0].where}; --host localhost keeps it here")
    return hosts


def _check_no_hosts(arguments: argparse.Namespace) -> None:
    for name in _NEEDS_HOSTS:
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name} chooses among hosts, and there are none; give --hostfile or --host")
    num_nodes = read_num_nodes(arguments) or 1
    if num_nodes > 1 and arguments.node_rank is None and not arguments.external:
        raise ConfigError(
            f"--nnodes is {num_nodes}, and nobody says which; give --hostfile or --host, or run one command on each node with "
            "--node-rank and --master-addr"
        )


def _split(option: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}: {error}; quote it as for a shell") from error
