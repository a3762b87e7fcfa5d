"""Faults of single processes on the hosts of a ``Cluster``; those of whole hosts and links are methods of ``Cluster``."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from support.cluster_host import ClusterHost
from support.host_proc import comm_of, command_of, variable_of
from support.polling import block_until

GUARD, AGENT, RANK = "zspmd-guard", "zspmd-agent", "zspmd-rank"
DEADLINE_S = 10.0


def named(host: ClusterHost, comm: str) -> list[int]:
    """Return the pids in a host that go by this name, such as ``GUARD``."""
    return [pid for pid in host.processes() if comm_of(pid) == comm]


def wait_named(host: ClusterHost, comm: str, timeout_s: float = DEADLINE_S) -> int:
    """Wait until exactly one process of a host goes by this name, and return its pid; raises TimeoutError."""
    block_until(lambda: len(named(host, comm)) == 1, timeout_s)
    return named(host, comm)[0]


def ranks(host: ClusterHost) -> dict[int, int]:
    """Return the pid of each rank in a host: workers go by a name, the ranks of a script have a variable and the agent as parent."""
    found = {}
    for pid in host.processes():
        name = comm_of(pid)
        number = name.removeprefix(RANK) if name.startswith(RANK) else variable_of(pid, "RANK") if _is_of_agent(pid) else ""
        if number.isdigit():
            found[int(number)] = pid
    return found


def carriers(driver_host: ClusterHost, target: str) -> list[int]:
    """Return the pids of the ssh or rsh clients that a driver has running towards a target, named as it names it."""
    clients = [pid for pid in driver_host.processes() if comm_of(pid) == "ssh" or "rsh_client.py" in command_of(pid)]
    return [pid for pid in clients if target in command_of(pid).split(" ")]


def kill(pid: int, timeout_s: float = DEADLINE_S) -> None:
    """Kill a process, and wait until it runs no more."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        block_until(lambda: not command_of(pid), timeout_s)
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def paused(*pids: int) -> Iterator[None]:
    """Stop processes for as long as this is entered; they are stopped when it begins, and those that still live go on at its end."""
    pidfds = [os.pidfd_open(pid) for pid in pids]
    try:
        for pidfd in pidfds:
            signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
        block_until(lambda: all(_stat(pid)[0] in "TZ" for pid in pids), DEADLINE_S)
        yield
    finally:
        for pidfd in pidfds:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)


def _is_of_agent(pid: int) -> bool:
    return comm_of(int(_stat(pid)[1])) == AGENT


def _stat(pid: int) -> list[str]:
    """Return the fields of a process's stat from its state on; those of a zombie without parent when it is no more."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z", "0"]
