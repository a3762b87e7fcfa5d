"""Which hosts of a file or allocation take part, in DeepSpeed's notation: ``h1@h2:0,2@[2001:db8::1]:1@n[1-4]``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ....errors import ConfigError, TopologyError
from .host import MAX_HOSTS, Host
from .host_entries import split_number
from .host_fields import MAX_SLOTS, canonical_name, check_name, check_whole, shown
from .host_ranges import expand_ranges

_SLOT = re.compile(r"[0-9]{1,9}")
_MAX_NAMED = 8

# By the key of a host: which of its slots, None for all.
_Slots = dict[str, tuple[int, ...] | None]


def select_hosts(
    hosts: Sequence[Host], *, include: str | None = None, exclude: str | None = None, num_nodes: int | None = None
) -> list[Host]:
    """Return the hosts that take part, in the order in which they came.

    Args:
        include: hosts, or slots of hosts, that stay; an entry that begins with '^' goes, and all stay where there is no other.
        exclude: hosts, or slots of hosts, that go; taken from what ``include`` leaves.
        num_nodes: how many of those that are left then, from the first.

    Slots count from 0, as the host has them before any is taken away. A host with some of its slots gets the devices of these: those of
    its ``devices``, or else the slots' own numbers.

    Raises:
        ConfigError: a host or slot that is not there, or nothing is left.
        TopologyError: fewer hosts than ``num_nodes``.
    """
    by_key = {host.key: host for host in hosts}
    chosen: _Slots = dict.fromkeys(by_key)
    if include is not None:
        kept, gone = _read("include", include, by_key)
        _drop(chosen := kept or chosen, gone, by_key)
    if exclude is not None:
        named, inverted = _read("exclude", exclude, by_key)
        if inverted:
            raise ConfigError(f"exclude is {shown(exclude)}; an entry with '^' is for include, leave the '^' out here")
        _drop(chosen, named, by_key)
    left = [_with_slots(host, chosen[host.key]) for host in hosts if host.key in chosen]
    if not left:
        raise ConfigError(f"the selection leaves no host of {_names(hosts)}; exclude fewer")
    return left if num_nodes is None else _first(left, num_nodes)


def _first(hosts: list[Host], num_nodes: int) -> list[Host]:
    check_whole("num_nodes", num_nodes, 1, MAX_HOSTS)
    if num_nodes > len(hosts):
        raise TopologyError(f"{num_nodes} nodes are asked for, and the hosts are {len(hosts)}: {_names(hosts)}; name more or ask for fewer")
    return hosts[:num_nodes]


def _read(option: str, text: str, hosts: Mapping[str, Host]) -> tuple[_Slots, _Slots]:
    """Return what a selection names, and what it names behind a '^'."""
    plain: _Slots = {}
    inverted: _Slots = {}
    for entry in text.split("@"):
        named = inverted if entry.startswith("^") else plain
        try:
            for key, slots in _entry(entry.removeprefix("^"), hosts):
                if key in named:
                    raise ConfigError(f"{shown(hosts[key].name)} is named twice; put its slots into one entry, as HOST:0,2")
                named[key] = slots
        except ConfigError as error:
            raise ConfigError(f"{option} is {shown(text)}: {error}") from None
    return plain, inverted


def _entry(entry: str, hosts: Mapping[str, Host]) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    if not entry:
        raise ConfigError("an entry is empty; write hosts with one '@' between two")
    name, numbers = split_number(entry)
    if "," in re.sub(r"\[[^\]]*\]", "", name):
        raise ConfigError(f"{shown(entry)} has a comma between hosts; here that is '@', as in h1@h2:0,2")
    slots = None if numbers is None else _read_slots(entry, numbers)
    for single in expand_ranges(name, MAX_HOSTS):
        check_name(single)
        host = hosts.get(canonical_name(single))
        if host is None:
            raise ConfigError(f"there is no host {shown(single)}; there are {_names(list(hosts.values()))}")
        if slots is not None and host.slots is not None and max(slots) >= host.slots:
            raise ConfigError(f"there is no slot {max(slots)} on {shown(single)}, which has {host.slots}, counted from 0")
        yield host.key, slots


def _read_slots(entry: str, text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(_SLOT.fullmatch(number) and int(number) < MAX_SLOTS for number in numbers):
        raise ConfigError(f"{shown(entry)} has no list of slots behind its colon; write it as HOST:0,2, and '@' between hosts")
    slots = tuple(map(int, numbers))
    if len(set(slots)) < len(slots):
        raise ConfigError(f"{shown(entry)} names a slot twice; name it once")
    return slots


def _drop(chosen: _Slots, gone: _Slots, hosts: Mapping[str, Host]) -> None:
    """Take hosts, or slots of them, out of ``chosen``."""
    for key, slots in gone.items():
        if key not in chosen:
            continue
        if slots is None:
            del chosen[key]
            continue
        present = chosen[key] or tuple(range(_num_slots(hosts[key])))
        chosen[key] = tuple(slot for slot in present if slot not in slots)
        if not chosen[key]:
            del chosen[key]


def _num_slots(host: Host) -> int:
    if host.slots is None:
        raise ConfigError(f"slots of {shown(host.name)} are excluded, and nobody says how many it has; write slots=N for it")
    return host.slots


def _with_slots(host: Host, slots: tuple[int, ...] | None) -> Host:
    if slots is None:
        return host
    devices = slots if host.devices is None else tuple(host.devices[slot] for slot in slots)
    return replace(host, slots=len(slots), devices=devices)


def _names(hosts: Sequence[Host]) -> str:
    rest = f" and {len(hosts) - _MAX_NAMED} more" if len(hosts) > _MAX_NAMED else ""
    return ", ".join(host.name for host in hosts[:_MAX_NAMED]) + rest
