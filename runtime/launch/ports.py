"""TCP ports that are known before anybody listens on them, and that nobody else can take.

A launch's ports follow from its id: a hash picks the first candidate, and each that is taken is passed over for the next one. The
probe is the bind itself, so that there is no moment between looking and taking.

The holder binds *without* SO_REUSEADDR, which excludes every other bind to the port, then sets SO_REUSEADDR on the bound socket
and never listens. From then on a server that sets SO_REUSEADDR (torch's TCPStore, libzmq, nearly all) can bind and listen on the
port as if it were free, while other launches, which probe without it, cannot. The port stays ours when that server dies.

It is held for all addresses of the machine, since torch's TCPStore listens on all of them: two launches that held one port each at an
address of their own, one of them over nodes, would have rank 0 of the second fail.
"""

from __future__ import annotations

import errno
import hashlib
import socket
from dataclasses import dataclass
from types import TracebackType

from ...errors import ConfigError, EndpointInUseError
from .port_holders import describe_holder

# Below the ephemeral range of Linux (32768), the NodePorts of Kubernetes (30000) and the 29500 that torch programs default to.
FIRST_PORT = 20_000
LAST_PORT = 28_999
_NUM_PORTS = LAST_PORT - FIRST_PORT + 1


@dataclass(frozen=True)
class ReservedPort:
    """A port that is held for as long as ``holder`` stays open; a context manager."""

    host: str
    port: int
    holder: socket.socket

    def close(self) -> None:
        """Give the port back."""
        self.holder.close()

    def __enter__(self) -> ReservedPort:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def first_candidate(launch_id: str, purpose: str) -> int:
    """Return the port that ``reserve_port`` tries first; a pure function, for plans that start nothing."""
    digest = hashlib.sha256(f"{launch_id}\0{purpose}".encode()).digest()
    return FIRST_PORT + int.from_bytes(digest[:8], "little") % _NUM_PORTS


def reserve_port(launch_id: str, purpose: str, host: str = "127.0.0.1") -> ReservedPort:
    """Hold the first free port at or after this launch's candidate, wrapping from 28999 to 20000.

    Keep the result open for the whole launch. Give ``host`` as the address that the server will bind.

    Raises:
        ConfigError: ``host`` is no address of this machine.
        EndpointInUseError: every port of the range is taken.
    """
    first = first_candidate(launch_id, purpose) - FIRST_PORT
    _check_address(host)
    for offset in range(_NUM_PORTS):
        port = FIRST_PORT + (first + offset) % _NUM_PORTS
        holder = _hold(port)
        if holder is not None:
            return ReservedPort(host, port, holder)
    raise EndpointInUseError(f"all ports from {FIRST_PORT} to {LAST_PORT} of {host} are taken; end other launches on this machine")


def hold_port(host: str, port: int) -> ReservedPort:
    """Hold this very port; keep the result open for the whole launch.

    Raises:
        ConfigError: ``host`` is no address of this machine.
        EndpointInUseError: somebody has the port.
    """
    _check_address(host)
    holder = _hold(port)
    if holder is None:
        who = describe_holder(port)
        raise EndpointInUseError(f"port {port} of {host} is taken by {who}; choose another, or none to be given a free one")
    return ReservedPort(host, port, holder)


def _check_address(host: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise ConfigError(f"cannot bind {host!r}: {error}; give an IP address of this machine") from error


def _hold(port: int) -> socket.socket | None:
    has_both = socket.has_dualstack_ipv6()
    holder = socket.socket(socket.AF_INET6 if has_both else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if has_both:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        holder.bind(("::" if has_both else "0.0.0.0", port))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except OSError as error:
        holder.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return None
        raise
    return holder
