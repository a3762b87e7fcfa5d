"""TCP endpoints: which addresses may be bound, the keys without which nothing binds or connects, and what guards a socket.

An ``ipc://`` endpoint lies in a directory that only its owner can enter, and ``inproc://`` in the process: they need no keys. TCP
always has CURVE, in both directions; there is no switch. ``door`` decides whose key opens the driver's sockets.
"""

from __future__ import annotations

import ipaddress
import socket as sockets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85

from ..errors import ConfigError, InsecureEndpointError
from .chunks import CHUNK_BYTES

KEY_CHARACTERS = 40  # of a CURVE key in Z85; 32 bytes
_LOCAL_SCHEMES = ("ipc", "inproc")
# libzmq holds what an unknown peer sends up to this size, and drops the connection beyond it
MAX_PART_BYTES = CHUNK_BYTES + 1024
SERVER_HANDSHAKE_MS = 2000  # an unknown peer keeps a descriptor of the driver for no longer
CLIENT_HANDSHAKE_MS = 10_000  # a rank waits for a driver that is paused or busy
RECONNECT_MS = 500  # of attempts before the first handshake; a connection that was lost is not taken up again
BACKLOG = 1024
# The kernel's own probes find a link that was cut within 4 s, and a peer whose process is stopped answers them all the same. Only ends
# that receive may be so strict: where values wait for a stopped peer, its full buffers count as no answer.
PROBE_S = 1
NUM_PROBES = 3
CUT_MS = 3000
_RECEIVERS = (zmq.SUB, zmq.XSUB, zmq.PULL)
# The second line: a peer whose host answers and whose process does not. It stays above the pause that a process may make.
HEARTBEAT_MS = 5000
HEARTBEAT_TIMEOUT_MS = 20_000


@dataclass(frozen=True)
class RankKeys:
    """The keys of one rank, in Z85: its own pair and the driver's public one. They live as long as the launch.

    Args:
        follow: called with each socket that is about to connect by them, and its name: step, result or control.

    Raises:
        InsecureEndpointError: one is absent, or no key.
    """

    public: bytes = field(repr=False)
    secret: bytes = field(repr=False)
    server: bytes = field(repr=False)
    follow: Callable[[zmq.Socket[bytes], str], None] | None = None

    def __post_init__(self) -> None:
        for name, key in (("public", self.public), ("secret", self.secret), ("driver's", self.server)):
            check_key(name, key)


def check_key(name: str, key: bytes) -> None:
    """Raise InsecureEndpointError unless ``key`` is a CURVE key in Z85; the text does not hold it."""
    if len(key) != KEY_CHARACTERS:
        raise InsecureEndpointError(
            f"the {name} key has {len(key)} characters; one has {KEY_CHARACTERS}: nothing uses TCP without its keys"
        )
    try:
        is_zero = not any(z85.decode(key))
    except (ValueError, KeyError, OverflowError):
        is_zero = True
    if is_zero:
        raise InsecureEndpointError(f"the {name} key is no CURVE key; nothing uses TCP without its keys")


def needs_keys(endpoint: str) -> bool:
    """Say whether ``endpoint`` is TCP; raises InsecureEndpointError for what is neither TCP nor within the host."""
    scheme = endpoint.partition("://")[0]
    if scheme in _LOCAL_SCHEMES:
        return False
    if scheme != "tcp":
        raise InsecureEndpointError(f"the endpoint {endpoint!r} is none of tcp://, {', '.join(f'{name}://' for name in _LOCAL_SCHEMES)}")
    return True


def tcp_endpoint(address: str) -> str:
    """Return the endpoint to bind at this IP address, at a port of the kernel's choice: the probe is the bind."""
    return f"tcp://[{address}]:*" if ":" in address else f"tcp://{address}:*"


def check_bind_address(bind: str) -> str:
    """Return the one IP address of this host that ``bind`` is or names.

    Raises:
        InsecureEndpointError: it means every interface, or a group of hosts; or this pyzmq has no CURVE.
        ConfigError: no address of this host.
    """
    if not isinstance(bind, str):
        raise ConfigError(f"bind is {bind!r}; give an IP address of this host as text, or None for no TCP at all")
    if not zmq.has("curve"):
        raise InsecureEndpointError(f"bind is {bind!r}, and this pyzmq was built without CURVE; install one that has it")
    if bind in ("", "*"):
        raise _not_one(bind, "every interface of the host")
    try:
        found = sockets.getaddrinfo(bind, 0, type=sockets.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"bind is {bind!r}: {error}; give an IP address of this host") from error
    for *_, place in found:
        _check_single(bind, str(place[0]))
    reasons = [_why_not_local(family, place) for family, _, _, _, place in found]
    if "" not in reasons:
        raise ConfigError(f"bind is {bind!r}, which is no address of this host: {reasons[0]}; 'ip addr' lists them")
    return str(found[reasons.index("")][4][0])


def _why_not_local(family: int, place: tuple[Any, ...]) -> str:
    """Return why this host cannot be reached at an address, or nothing."""
    with sockets.socket(family, sockets.SOCK_STREAM) as probe, sockets.socket(family, sockets.SOCK_DGRAM) as peer:
        try:
            probe.bind(place)
            peer.connect((place[0], 9, *place[2:]))  # sends nothing; the kernel binds to a broadcast address, and connects to none
        except OSError as error:
            return str(error)
    return ""


def _check_single(bind: str, address: str) -> None:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    if parsed.is_unspecified:
        raise _not_one(bind, "every interface of the host")
    if parsed.is_multicast:
        raise _not_one(bind, "a group of hosts")


def _not_one(bind: str, meaning: str) -> InsecureEndpointError:
    return InsecureEndpointError(f"bind is {bind!r}, which means {meaning}; name the one IP address that the ranks are to reach")


def secure_client(socket: zmq.Socket[bytes], endpoint: str, name: str, keys: RankKeys | None) -> None:
    """Set up a rank's socket ``name`` for ``endpoint``, before it connects.

    Raises:
        InsecureEndpointError: TCP without keys.
    """
    if not needs_keys(endpoint):
        return
    if keys is None:
        raise InsecureEndpointError(f"{endpoint} is TCP and this side has no keys; nothing was connected")
    socket.setsockopt(zmq.CURVE_SERVERKEY, keys.server)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.HANDSHAKE_IVL, CLIENT_HANDSHAKE_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    limit_socket(socket, endpoint)
    if keys.follow is not None:
        keys.follow(socket, name)


def limit_socket(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Set what both sides of a TCP connection have: the limit of a part, and how a dead link is found."""
    socket.setsockopt(zmq.IPV6, int("[" in endpoint))
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PART_BYTES)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, PROBE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, PROBE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, NUM_PROBES)
    socket.setsockopt(zmq.TCP_MAXRT, CUT_MS if socket.getsockopt(zmq.TYPE) in _RECEIVERS else HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
