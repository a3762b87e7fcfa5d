"""A machine of a launch, as a hostfile, a list or a batch system names it."""

from __future__ import annotations

from dataclasses import dataclass

from ....errors import ConfigError
from .host_fields import (
    MAX_DEVICE,
    MAX_PORT,
    MAX_SLOTS,
    canonical_name,
    check_name,
    check_python,
    check_user,
    check_whole,
    read_address,
    read_iface,
)

MAX_HOSTS = 1 << 16


@dataclass(frozen=True)
class Host:
    """Where ranks may run, how many, and how the machine is reached.

    Args:
        name: what ssh is given, without a user: a name, an IPv4 address, or an IPv6 address without brackets.
        slots: how many ranks it takes; None where nobody said, never its number of cores.
        user, port: of ssh; None leaves them to ssh.
        addr: the IP address for data; iface: the interface for data, by name or as a network. None leaves it to the preflight.
        devices: the CUDA devices of its slots, in the order of its ranks; one may stand twice.
        python: the interpreter there, an absolute path or a command.
        max_slots: a bound on ``slots``, which is only checked.
        where: who named it, for messages: "hosts:3", "--host", "SLURM_JOB_NODELIST".

    Raises:
        ConfigError: a value that cannot be, with what may stand there.
    """

    name: str
    slots: int | None = None
    user: str | None = None
    port: int | None = None
    addr: str | None = None
    iface: str | None = None
    devices: tuple[int, ...] | None = None
    python: str | None = None
    max_slots: int | None = None
    where: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.user is not None:
            check_user(self.user)
        if self.python is not None:
            check_python(self.python)
        if self.addr is not None:
            read_address(self.addr)
        if self.iface is not None:
            read_iface(self.iface)
        self._check_numbers()

    @property
    def target(self) -> str:
        """What ssh is given, and what messages show: ``user@name``, or the name."""
        return f"{self.user}@{self.name}" if self.user else self.name

    @property
    def key(self) -> str:
        """Equal for two spellings of the same name: "Node1" and "node1", "2001:db8::1" and "2001:DB8:0::1"."""
        return canonical_name(self.name)

    def _check_numbers(self) -> None:
        for name, high in (("slots", MAX_SLOTS), ("max_slots", MAX_SLOTS), ("port", MAX_PORT)):
            if (number := getattr(self, name)) is not None:
                check_whole(name, number, 1, high)
        for device in self.devices or ():
            check_whole("devices", device, 0, MAX_DEVICE)
        if self.devices is not None and self.slots is not None and len(self.devices) < self.slots:
            raise ConfigError(f"slots={self.slots} and devices has {len(self.devices)}; list a device for each slot, or fewer slots")
        if self.max_slots is not None and self.slots is not None and self.slots > self.max_slots:
            raise ConfigError(f"slots={self.slots} is more than max_slots={self.max_slots}; raise the one or lower the other")
