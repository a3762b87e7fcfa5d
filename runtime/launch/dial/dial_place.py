"""The place of a process among the nodes that call in, and how it finds the driver: node 0 is the driver's own, and listens."""

from __future__ import annotations

import hashlib
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from ....errors import ConfigError
from ....transport.security import check_bind_address
from ..devices import num_cuda_devices
from ..hosts.host_ranges import expand_ranges
from ..hosts.own_host import resolve
from ..launch_id import check_launch_id
from .dial import SILENCE_S, dial_ports
from .dial_file import wait_dial_file
from .dial_keys import SECRET_VARIABLE, DialKeys
from .dial_out import DialOut, describe_self
from .external import ExternalRank

CALL_S = 120.0  # for which the commands of a launch wait for each other
_LOOPBACK = "127.0.0.1"
_NO_SECRET = (
    "nodes on several machines know each other by a secret: make one with `openssl rand -hex 32` and give all of them the same, as "
    f"{SECRET_VARIABLE} or in a file of mode 0600 by --secret-file"
)


@dataclass(frozen=True)
class DialPlace:
    """One node's place.

    Attributes:
        num_slots: ranks that this node takes; ``local_rank`` and ``local_world_size`` place the first of them on its machine.
        secret: None where all nodes are on this machine and find each other by a file.
        lease_s: for how long driver and nodes may hear nothing of each other.
        master_addr: an address of the driver's machine, or a name; ``port`` its port, None for one that follows from the launch id.
    """

    launch_id: str
    node_rank: int
    num_nodes: int
    num_slots: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    secret: bytes | None = field(default=None, repr=False)
    master_addr: str = _LOOPBACK
    port: int | None = None
    lease_s: float = SILENCE_S

    @property
    def is_driver(self) -> bool:
        return self.node_rank == 0

    @property
    def has_file(self) -> bool:
        """Whether the nodes find each other by a file of this machine."""
        return self.secret is None

    def keys(self, secret: bytes) -> DialKeys:
        """Return the keys that follow from a secret."""
        return DialKeys(secret, self.launch_id)

    def own_address(self) -> str:
        """Return the address at which the driver is to listen.

        Raises:
            ConfigError: the name or address is none of this machine, or one that no other machine reaches.
        """
        address = check_bind_address(self.master_addr)
        if is_loopback(address) and self.master_addr not in ("localhost", address):
            raise ConfigError(
                f"{self.master_addr} is {address} on this machine, which others cannot reach; give --master-addr an IP address"
            )
        return address

    @property
    def devices(self) -> tuple[int, ...]:
        """The CUDA devices of this node's ranks, of those that this process sees: all launchers' ways, to show each its own or all."""
        count = num_cuda_devices()
        return tuple((self.local_rank + slot) % count for slot in range(self.num_slots)) if count else ()


def external_place(
    rank: ExternalRank,
    environment: Mapping[str, str],
    *,
    secret: bytes | None,
    launch_id: str | None,
    master_addr: str,
    port: int | None,
    lease_s: float = SILENCE_S,
) -> DialPlace:
    """Return the place of a process that another launcher has started: each is a node with one slot.

    Raises:
        ConfigError: several machines and no secret, no address of rank 0's, or no launch id where the launcher has no identity.
    """
    if not rank.is_one_machine:
        if secret is None:
            raise ConfigError(
                f"{rank.launcher} has started {rank.world_size} ranks, of which {rank.local_world_size} are here; {_NO_SECRET}"
            )
        master_addr = master_addr or rank.master_addr or _first_host(environment)
        if not master_addr:
            raise ConfigError(f"{rank.launcher} does not tell where rank 0 is; give all ranks --master-addr or MASTER_ADDR")
    return DialPlace(
        launch_id=rank.launch_id if launch_id is None else check_launch_id(launch_id),
        node_rank=rank.rank,
        num_nodes=rank.world_size,
        local_rank=rank.local_rank,
        local_world_size=rank.local_world_size,
        secret=secret,
        master_addr=_LOOPBACK if rank.is_one_machine and not master_addr else master_addr,
        port=port,
        lease_s=lease_s,
    )


def manual_place(
    *,
    node_rank: int,
    num_nodes: int,
    num_slots: int,
    master_addr: str,
    port: int | None,
    secret: bytes | None,
    launch_id: str | None,
    lease_s: float = SILENCE_S,
) -> DialPlace:
    """Return the place of a node that was started by hand, one command a node.

    Raises:
        ConfigError: numbers that cannot be, or no secret where ``master_addr`` is not within this machine.
    """
    if not 0 <= node_rank < num_nodes:
        raise ConfigError(f"--node-rank is {node_rank} and --nnodes {num_nodes}; nodes count from 0")
    if secret is None and not is_loopback(resolve_one(master_addr)):
        raise ConfigError(f"--master-addr is {master_addr}; {_NO_SECRET}")
    given = (secret or b"").hex() or f"{os.getuid()} {num_nodes} {port}"
    return DialPlace(
        launch_id=f"nodes-{hashlib.blake2b(given.encode(), digest_size=8).hexdigest()}"
        if launch_id is None
        else check_launch_id(launch_id),
        node_rank=node_rank,
        num_nodes=num_nodes,
        num_slots=num_slots,
        secret=secret,
        master_addr=master_addr,
        port=port,
        lease_s=lease_s,
    )


async def find_driver(place: DialPlace, *, timeout_s: float) -> DialOut:
    """Find the driver and return what calls it: ``run`` serves until the end of the launch.

    Raises:
        LaunchError: there is no driver within ``timeout_s``.
        ConfigError: its name has no address.
    """
    call = describe_self(
        place.launch_id,
        place.node_rank,
        place.num_nodes,
        num_slots=place.num_slots,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        devices=place.devices,
    )
    if place.secret is None:
        file = await wait_dial_file(place.launch_id, timeout_s)
        return DialOut(call, place.keys(file.secret.encode()), file.address, [file.port], timeout_s=timeout_s, silence_s=place.lease_s)
    ports = dial_ports(place.launch_id) if place.port is None else [place.port]
    return DialOut(call, place.keys(place.secret), resolve_one(place.master_addr), ports, timeout_s=timeout_s, silence_s=place.lease_s)


def resolve_one(name: str) -> str:
    """Return an IP address of a name; raises ConfigError where it has none."""
    addresses = resolve(name)
    if not addresses:
        raise ConfigError(f"--master-addr is {name!r}, which has no address here; give an IP address of node 0")
    return addresses[0]


def is_loopback(address: str) -> bool:
    """Say whether no other machine reaches an IP address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _first_host(environment: Mapping[str, str]) -> str:
    """Return the first node of a Slurm step, on which rank 0 is, or nothing."""
    listed = environment.get("SLURM_STEP_NODELIST", "")
    first, depth = "", 0
    for character in listed:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            break
        first += character
    return expand_ranges(first, 1 << 16)[0] if first else ""
