"""Which backends of collectives there are, and which fits a launch: driver and ranks ask here. Loads none of them.

A vendor adds one by an entry point of the group ``zspmd.communicators``: its name, and ``module:factory``, where the factory takes a
``CommunicatorSetup`` and returns a ``Communicator``.
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points

from .errors import ConfigError, TopologyError

ENTRY_POINT_GROUP = "zspmd.communicators"
MAX_NAME_LENGTH = 64  # what a rank is told has this room
_DEVICES = {"shm": ("cpu",), "gloo": ("cpu",), "nccl": ("cuda",), "nccl-raw": ("cuda",)}
BUILT_IN = tuple(_DEVICES)


def choose_communicator(name: str, devices: Sequence[str], *, is_one_node: bool = True) -> str:
    """Return the backend that every rank of a launch uses: the one asked for, or the fastest that fits.

    Args:
        name: a built-in backend, a vendor's, or "auto".
        devices: each rank's: "cpu" or "cuda:N".
        is_one_node: whether all ranks share one machine, and so its memory.

    Raises:
        ConfigError: no such backend, or not on this machine.
        TopologyError: the backend cannot serve these devices, or they are of two kinds.
    """
    kinds = {device.partition(":")[0] for device in devices}
    if len(kinds) > 1:
        raise TopologyError(f"devices are {', '.join(devices)}: no collective spans CPUs and GPUs; give all ranks the same kind")
    if name == "auto":
        if kinds == {"cuda"}:
            return "nccl"
        if kinds != {"cpu"}:
            raise TopologyError(f"no built-in communicator serves {devices[0]!r}; name a vendor's: {_listed(vendor_entry_points())}")
        return "shm" if is_one_node and _keeps_store_order() else "gloo"
    vendors = vendor_entry_points()
    if name in vendors:
        return name
    if name not in BUILT_IN:
        raise ConfigError(_describe_unknown(name, [*BUILT_IN, *vendors]))
    if not kinds <= set(_DEVICES[name]):
        raise TopologyError(f"communicator {name!r} does not serve {devices[0]!r}; on GPUs use nccl or nccl-raw, on CPUs shm or gloo")
    if name == "shm":
        _check_shared_memory(is_one_node=is_one_node)
    return name


def vendor_entry_points() -> dict[str, EntryPoint]:
    """Return the backends that installed distributions add, by name; imports none of them.

    Raises:
        ConfigError: a name that is taken, by a built-in backend or by another distribution, or is too long.
    """
    found: dict[str, EntryPoint] = {}
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        name, other = entry_point.name, found.get(entry_point.name)
        if name in (*BUILT_IN, "auto"):
            raise ConfigError(f"the communicator {name!r} of {_origin(entry_point)} has the name of a built-in one; uninstall it")
        if other is not None:
            raise ConfigError(f"{_origin(other)} and {_origin(entry_point)} both add a communicator {name!r}; uninstall one")
        if len(name) > MAX_NAME_LENGTH:
            raise ConfigError(f"the communicator {name!r} of {_origin(entry_point)} has a name of more than {MAX_NAME_LENGTH} characters")
        found[name] = entry_point
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none is installed"


def _describe_unknown(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"communicator is {name!r}{hint}; choose one of {', '.join(['auto', *known])}"


def _check_shared_memory(*, is_one_node: bool) -> None:
    if not is_one_node:
        raise TopologyError("communicator 'shm' serves the ranks of one node only; use gloo")
    if not _keeps_store_order():
        raise ConfigError(f"communicator 'shm' needs an x86-64 processor, this is {platform.machine()}; use gloo")


def _keeps_store_order() -> bool:
    """Whether stores of one core become visible to others in program order, on which shared-memory collectives rely."""
    return platform.machine() in ("x86_64", "AMD64")


def _origin(entry_point: EntryPoint) -> str:
    distribution = "" if entry_point.dist is None else f"{entry_point.dist.name}: "
    return f"{distribution}{entry_point.value}"
