"""Hosts that come in one text or from a batch system: ``--host``, ``launch(hosts=[...])``, Slurm, PBS, SGE and LSF."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ....errors import ConfigError, HostfileError
from .host import MAX_HOSTS, Host
from .host_collector import HostCollector
from .host_fields import MAX_SLOTS, read_whole, shown
from .hostfile import cut_comment, parse_hostfile, read_host_text

_OPTION = "--host"
_ARGUMENT = "launch(hosts=...)"
_BLANKS = " \t"
_COUNT = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")
_FIELD = re.compile(r"[^ \t\r]+")


def parse_host_list(text: str, notes: list[str] | None = None, *, path: str = _OPTION) -> list[Host]:
    """Return the hosts of a list such as ``h1:2,lee@h2,[2001:db8::1]:3,n[1-3],^n2``; a host named again gets more slots.

    Args:
        notes: as in ``read_hostfile``.
        path: what gave the list, for messages.

    Raises:
        HostfileError: every entry that is wrong, by its column.
    """
    collector = HostCollector(path, is_list=True, is_adding=True)
    for entry, column in _split(text):
        if not entry.strip(_BLANKS):
            collector.refuse((1, column, "an entry is empty; write hosts with one comma between two"))
        elif "=" in entry or len(entry.split()) > 1:
            advice = "an entry here is HOST, HOST:N or USER@HOST; a hostfile takes keys"
            collector.refuse((1, column, f"{shown(entry)} has keys or blanks; {advice}"))
        else:
            collector.add(entry, 1, column)
    return collector.finish(notes)


def parse_hosts(entries: Sequence[str | Host], notes: list[str] | None = None) -> list[Host]:
    """Return the hosts of a program's list: each entry is a line of a hostfile, or a Host.

    Raises:
        HostfileError: as for a hostfile; the line is the entry's place, from 1.
    """
    collector = HostCollector(_ARGUMENT)
    given: Sequence[object] = entries  # the caller may not check its types
    for number, entry in enumerate(given, 1):
        if isinstance(entry, Host):
            collector.add_host(entry, number)
        elif not isinstance(entry, str):
            collector.refuse((number, 1, f"{shown(entry)} is no text and no Host; write a line as in a hostfile"))
        elif text := cut_comment(entry):
            collector.add(text, number)
        else:
            collector.refuse((number, 1, f"{shown(entry)} names no host; leave the entry out"))
    return collector.finish(notes)


def allocation_hosts(environment: Mapping[str, str], notes: list[str] | None = None) -> list[Host] | None:
    """Return the hosts that a batch system has given this job; None outside of one.

    The first that is set counts: SLURM_JOB_NODELIST, PBS_NODEFILE, PE_HOSTFILE (SGE), LSB_DJOB_HOSTFILE (LSF); an empty value is as none.

    Raises:
        HostfileError: the batch system's list or file cannot be used; ``path`` begins with the variable.
    """
    if environment.get("SLURM_JOB_NODELIST"):
        return _slurm_hosts(environment, notes)
    for variable in ("PBS_NODEFILE", "PE_HOSTFILE", "LSB_DJOB_HOSTFILE"):
        if path := environment.get(variable):
            label = f"{variable}={path}"
            text = read_host_text(path, label)
            return _sge_hosts(text, label, notes) if variable == "PE_HOSTFILE" else _one_slot_a_line(parse_hostfile(text, label, notes))
    return None


def _split(text: str) -> Iterator[tuple[str, int]]:
    """Yield what stands between commas outside of brackets, each with its column."""
    start = depth = 0
    for place, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if character == "," and depth <= 0:
            yield text[start:place], start + 1
            start, depth = place + 1, 0
    yield text[start:], start + 1


def _slurm_hosts(environment: Mapping[str, str], notes: list[str] | None) -> list[Host]:
    hosts = parse_host_list(environment["SLURM_JOB_NODELIST"], path="SLURM_JOB_NODELIST")
    counts = _slurm_counts(environment, len(hosts), notes)
    return [replace(host, slots=slots) for host, slots in zip(hosts, counts)]


def _slurm_counts(environment: Mapping[str, str], num_hosts: int, notes: list[str] | None) -> Sequence[int | None]:
    """Return the tasks of each node, as far as the job has said how many it wants."""
    text = environment.get("SLURM_TASKS_PER_NODE")
    if text and _is_count_of_cores(environment):
        if notes is not None:
            notes.append(f"SLURM_TASKS_PER_NODE={text} counts cores, as the job asked for no tasks: slots are not taken from it")
        return [None] * num_hosts
    if text:
        return _read_counts(text, num_hosts)
    if text := environment.get("SLURM_NTASKS_PER_NODE"):
        try:
            return [read_whole("slots", text, 1, MAX_SLOTS)] * num_hosts
        except ConfigError as error:
            raise HostfileError([(1, 1, str(error))], path="SLURM_NTASKS_PER_NODE") from error
    return [None] * num_hosts


def _is_count_of_cores(environment: Mapping[str, str]) -> bool:
    """Say whether Slurm made up the number of tasks, from the cores: then it is theirs, and nobody's wish is in the environment."""
    is_asked = any(environment.get(name) for name in ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE"))
    return not is_asked and environment.get("SLURM_TASKS_PER_NODE") == environment.get("SLURM_JOB_CPUS_PER_NODE")


def _read_counts(text: str, num_hosts: int) -> list[int]:
    """Return one number for each node from Slurm's short form: "4(x2),3" is 4, 4, 3."""
    path, counts, column = "SLURM_TASKS_PER_NODE", list[int](), 1
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if match is None or not 1 <= int(match[1]) <= MAX_SLOTS or not 1 <= int(match[2] or 1) <= MAX_HOSTS - len(counts):
            raise HostfileError([(1, column, f"{shown(part)} is no number of tasks; Slurm writes 4 or 4(x2)")], path=path)
        counts += [int(match[1])] * int(match[2] or 1)
        column += len(part) + 1
    if len(counts) != num_hosts:
        rule = f"{shown(text)} is for {len(counts)} nodes, and SLURM_JOB_NODELIST names {num_hosts}; were they set by hand?"
        raise HostfileError([(1, 1, rule)], path=path)
    return counts


def _one_slot_a_line(hosts: list[Host]) -> list[Host]:
    return [host if host.slots else replace(host, slots=1) for host in hosts]


def _sge_hosts(text: str, label: str, notes: list[str] | None) -> list[Host]:
    """Return the hosts of SGE's file: host, slots, queue and processors on a line, a host again for each of its queues."""
    collector = HostCollector(label, is_adding=True)
    for number, line in enumerate(text.split("\n"), 1):
        fields = [(match[0], match.start() + 1) for match in _FIELD.finditer(line)]
        if not fields:
            continue
        host, column = fields[0]
        if len(fields) < 2:
            collector.refuse((number, column, f"{shown(host)} has no number of slots behind it; SGE writes HOST SLOTS QUEUE CORES"))
        else:
            collector.add(f"{host} slots={fields[1][0]}", number, column)
    return collector.finish(notes)
