"""What makes nodes fit for one launch, judged from their facts: no I/O, so that every rule has a table of cases.

    facts of each node ──compare_facts, check_capacity──> problems
    their addresses    ──reach_targets──> who connects to whom (which addresses: ``node_addresses``)
    what came of it    ──judge_listening, judge_reached──> problems

zspmd, its code and Python's minor version have to be equal, or records and user code may mean different things at either end. So has
torch, to the build: ranks compute parts of one tensor. Of the other packages major and minor version: their patches keep formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ....errors import NodeProblem as NodeProblem
from ..resources import num_files_needed
from .node_addresses import choose_address as choose_address
from .node_addresses import driver_address as driver_address
from .node_addresses import find_address as find_address
from .node_addresses import find_driver_address as find_driver_address
from .node_facts import CODE, PACKAGES, UNLIMITED, NodeFacts

# Above it each node proves only what every launch needs: the ways to node 0 and to the driver.
MAX_MESH_NODES = 16
# Used by ranks alone, and not to be compared with a driver's machine that has none.
_OF_RANKS = ("torch",)


@dataclass(frozen=True)
class Place:
    """Where a host has a listener."""

    host: str
    address: str
    port: int


# --- facts ---


def compare_facts(
    reference: NodeFacts, others: Sequence[tuple[str, NodeFacts]], *, allow_same_host: bool = False, local_host: str | None = None
) -> list[NodeProblem]:
    """Return in what other nodes differ from the driver's machine, by host in their order.

    Args:
        reference: the driver's machine.
        others: the other nodes, by the names that their user knows.
        allow_same_host: whether two of them may be one machine.
        local_host: the name of the driver's machine where it is a node too.
    """
    nodes = [*([(local_host, reference)] if local_host is not None else []), *others]
    wanted = {package: _wanted_version(package, reference, nodes) for package in PACKAGES}
    problems = []
    for host, facts in others:
        found = [*_compare_programs(reference, facts), *_compare_packages(wanted, facts), *_compare_files(reference, facts)]
        problems += [NodeProblem(host, *what) for what in found]
    return problems + ([] if allow_same_host else _find_twins(nodes))


def check_capacity(host: str, facts: NodeFacts, devices: Sequence[str]) -> list[NodeProblem]:
    """Return what a node lacks for these ranks; ``devices`` has one for each: "cpu" or "cuda:<index>"."""
    problems = []
    absent = [device for device in devices if device.startswith("cuda:") and int(device.partition(":")[2]) >= facts.cuda_devices]
    if absent:
        text = f"{', '.join(dict.fromkeys(absent))} would be used, and it shows {facts.cuda_devices} CUDA devices"
        advice = "give it fewer slots, name its devices with devices= in the hostfile, or check CUDA_VISIBLE_DEVICES and nvidia-smi there"
        problems.append(NodeProblem(host, "devices", text, advice))
    needed = num_files_needed(len(devices))
    if facts.file_limit < min(needed, UNLIMITED):
        text = f"a process may open {facts.file_limit} files, and {_ranks(len(devices))} {needed}"
        problems.append(NodeProblem(host, "limits", text, "raise nofile in /etc/security/limits.conf there, or LimitNOFILE of its sshd"))
    return problems


def note_facts(nodes: Sequence[tuple[str, NodeFacts]]) -> list[NodeProblem]:
    """Return what does no harm to a launch, and may to other programs on these nodes."""
    text = "its name {} leads to loopback addresses alone"
    advice = "ranks are told their interface (GLOO_SOCKET_IFNAME), others look the name up: give it the node's address in /etc/hosts"
    return [NodeProblem(host, "name", text.format(facts.hostname), advice) for host, facts in nodes if facts.loopback_name]


def _compare_programs(reference: NodeFacts, facts: NodeFacts) -> list[tuple[str, str, str]]:
    problems = []
    mine, theirs = reference.versions.get("zspmd", ""), facts.versions.get("zspmd", "")
    if mine != theirs:
        install = f"install the driver's version there: {facts.executable} -m pip install zspmd=={mine}"
        problems.append(("zspmd", f"{theirs or 'not installed'}, the driver has {mine}", install))
    elif reference.versions.get(CODE) != facts.versions.get(CODE):
        text = f"{theirs} with other code than the driver's: {facts.versions.get(CODE)}, not {reference.versions.get(CODE)}"
        problems.append(("zspmd", text, "install both from the same commit, or have the nodes share one directory"))
    if _numbers(reference.python_version) != _numbers(facts.python_version):
        text = f"{facts.python_version} at {facts.executable}, the driver has {reference.python_version}"
        minor = ".".join(reference.python_version.split(".")[:2])
        problems.append(("python", text, f"install Python {minor} there, or name another interpreter with python= in the hostfile"))
    return problems


def _wanted_version(package: str, reference: NodeFacts, nodes: Sequence[tuple[str, NodeFacts]]) -> tuple[str, str]:
    """Return whose version of a package counts, and which that is; of what ranks use, that of the first node."""
    candidates = [*([] if package in _OF_RANKS else [("the driver", reference)]), *nodes]
    return next(((who, facts.versions[package]) for who, facts in candidates if facts.versions.get(package)), ("", ""))


def _compare_packages(wanted: dict[str, tuple[str, str]], facts: NodeFacts) -> list[tuple[str, str, str]]:
    problems = []
    for package, (who, version) in wanted.items():
        found = facts.versions.get(package, "")
        is_equal = found == version if package in _OF_RANKS else bool(found) and _numbers(found) == _numbers(version)
        if version and not is_equal:
            text = f"{found or 'not installed'}, {who} has {version}"
            problems.append((package, text, f"{facts.executable} -m pip install {package}=={version}"))
    return problems


def _compare_files(reference: NodeFacts, facts: NodeFacts) -> list[tuple[str, str, str]]:
    problems = []
    if facts.cwd_error:
        problems.append(("cwd", facts.cwd_error, "make that directory there, or start from one that all nodes share"))
    if facts.script_error:
        problems.append(("script", facts.script_error, "copy it there, or start from a directory that all nodes share"))
    elif facts.script_sha256 != reference.script_sha256 and reference.script_sha256:
        text = f"is another file than the driver's: sha256 {facts.script_sha256[:12]}, not {reference.script_sha256[:12]}"
        problems.append(("script", text, "copy the driver's there, or start from a directory that all nodes share"))
    return problems


def _find_twins(nodes: Sequence[tuple[str, NodeFacts]]) -> list[NodeProblem]:
    """Return the hosts that are a machine which an earlier entry names already."""
    first: dict[tuple[str, str], str] = {}
    problems = []
    for host, facts in nodes:
        other = first.setdefault((facts.boot_id, facts.network_id), host)
        if other is not host:
            text = f"is the same machine as {other} ({facts.hostname})"
            problems.append(NodeProblem(host, "same host", text, "write one entry with the slots of both, or allow it: --allow-same-host"))
    return problems


# --- ways ---


def reach_targets(nodes: Sequence[Place], driver: Place) -> list[list[Place]]:
    """Return for each node the listeners that it is to connect to: the driver's, and up to 16 nodes each other's, beyond that node 0's.

    A place that two of them share is tried once; nobody tries its own.
    """
    wanted = nodes if len(nodes) <= MAX_MESH_NODES else nodes[:1]
    places = {(place.address, place.port): place for place in (driver, *wanted)}
    return [[place for key, place in places.items() if key != (node.address, node.port)] for node in nodes]


def judge_listening(host: str, address: str, error: str) -> list[NodeProblem]:
    """Return the problem, if there is an error, that a node cannot listen at its address."""
    advice = "choose another of its addresses with addr= or iface= in the hostfile"
    return [NodeProblem(host, "listen", f"cannot listen at {address}: {error}", advice)] if error else []


def judge_reached(origin: str, targets: Sequence[Place], errors: Sequence[str]) -> list[NodeProblem]:
    """Return a problem for each place that the host ``origin`` has not reached; ``errors`` are what ``reach`` returned, in order."""
    return [
        NodeProblem(origin, "tcp", f"{place.host} at {place.address} port {place.port}: {error}", _way_advice(origin, place, error))
        for place, error in zip_longest(targets, errors[: len(targets)], fillvalue="its agent does not say")
        if error and isinstance(place, Place)
    ]


def _way_advice(origin: str, place: Place, error: str) -> str:
    other = "or choose another network: --iface, or addr= in the hostfile"
    if error.startswith("no answer"):
        return f"a firewall drops it or the way back is missing: open TCP from {origin} to {place.address}, {other}"
    if error == "Connection refused":
        return f"a firewall rejects it, or {place.address} is another machine there: open TCP from {origin} to it, {other}"
    if error in ("No route to host", "Network is unreachable"):
        return f"{origin} has no way to this network: see 'ip route get {place.address}' there, {other}"
    return f"see what is between {origin} and {place.address} (a proxy, address translation), {other}"


def _ranks(count: int) -> str:
    return "1 rank needs" if count == 1 else f"{count} ranks need"


def _numbers(version: str) -> list[str]:
    return version.split(".")[:2]
