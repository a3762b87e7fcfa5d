"""What a list of hosts comes to, in one line each, as the tests and the tables of docs/hostfile.md write it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from zspmd.runtime.launch.hosts.host import Host


def reading(hosts: Iterable[Host]) -> list[str]:
    """Return a line per host which is itself a line of a hostfile: user@name, then what is known of it."""
    return [" ".join([host.target, *_known(host)]) for host in hosts]


def _known(host: Host) -> Iterable[str]:
    for field in fields(host):
        value = getattr(host, field.name)
        if field.name not in ("name", "user", "where") and value is not None:
            yield f"{field.name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
