"""What an agent finds out about its node before a launch: the answer to ``Examine``.

Nothing that ranks use is imported: versions are those of the installed packages' metadata.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import resource
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .... import __version__
from ....transport.schema import flag, many, mapping, text, whole
from ..agent_protocol import AgentRecord
from ..devices import available_cores, num_cuda_devices

UNLIMITED = (1 << 63) - 1
PACKAGES = ("torch", "pyzmq", "msgpack", "numpy")
# In ``NodeFacts.versions``: a digest of zspmd's own code, since checkouts of one version may differ.
CODE = "zspmd code"
_MAX_TEXT = 1 << 16
_MAX_ADDRESSES = 4096
_MAX_COUNT = 1 << 20
_CHUNK_BYTES = 1 << 20
# A resolver that has no server to ask takes longer than a launch may wait.
_LOOK_UP_S = 2.0
_ROOT = Path(__file__).parents[3]
_CODE_FOLDERS = (".", "transport", "runtime", "workers", "models")


@dataclass(frozen=True)
class Examine(AgentRecord):
    """Say what there is on this node: ``NodeFacts``. Where ``cwd`` or ``script`` is empty, none is looked for."""

    cwd: str = text(_MAX_TEXT, default="")
    script: str = text(_MAX_TEXT, default="")


@dataclass(frozen=True, kw_only=True)
class NodeFacts(AgentRecord):
    """The facts of one node.

    Args:
        versions: by package, empty for one that is absent; and what ``CODE`` says.
        boot_id, network_id: the same pair is the same machine; containers of one have networks of their own.
        addresses: "IFACE ADDRESS" of each interface that is up, in the system's order.
        ssh_connection: "CLIENT PORT SERVER PORT", where sshd has started the agent.
        cores, cuda_devices: that this node's ranks may use.
        cwd_error, script_error: why it cannot be used; empty where it can.
        file_limit: descriptors of a process; ``UNLIMITED`` for no limit.
        shared_bytes: free in /dev/shm.
        loopback_name: whether the node's own name leads to itself alone (127.0.1.1), as Debian sets it up.
    """

    hostname: str = text(256)
    python_version: str = text(64)
    executable: str = text(4096)
    versions: dict[str, str] = mapping()
    boot_id: str = text(64)
    network_id: str = text(64)
    addresses: tuple[str, ...] = many(str, _MAX_ADDRESSES)
    ssh_connection: str = text(256, default="")
    cores: int = whole(_MAX_COUNT)
    cuda_devices: int = whole(_MAX_COUNT)
    cwd_error: str = text(_MAX_TEXT, default="")
    script_error: str = text(_MAX_TEXT, default="")
    script_sha256: str = text(64, default="")
    file_limit: int = whole(UNLIMITED)
    shared_bytes: int = whole(UNLIMITED)
    loopback_name: bool = flag(default=False)


def gather_facts(examine: Examine) -> NodeFacts:
    """Return the facts of this node; takes about 0.1 s, and up to 2 s more where names are looked up in vain."""
    script_error, script_sha256 = _read_script(examine) if examine.script else ("", "")
    hostname = socket.gethostname()
    return NodeFacts(
        hostname=hostname,
        python_version=".".join(map(str, sys.version_info[:3])),
        executable=sys.executable,
        versions={"zspmd": __version__, CODE: code_digest(), **{name: _version(name) for name in PACKAGES}},
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        network_id=str(os.stat("/proc/self/ns/net").st_ino),
        addresses=tuple(own_addresses()),
        ssh_connection=os.environ.get("SSH_CONNECTION", "")[:256],
        cores=available_cores(),
        cuda_devices=num_cuda_devices(),
        cwd_error=_why_no_directory(examine.cwd) if examine.cwd else "",
        script_error=script_error,
        script_sha256=script_sha256,
        file_limit=_file_limit(),
        shared_bytes=_shared_bytes(),
        loopback_name=_is_loopback_name(hostname),
    )


def own_addresses() -> list[str]:
    """Return "IFACE ADDRESS" for each IP address of an interface that is up, without the scope of link-local ones."""
    import psutil  # a library of its own, which a launch on one node never needs

    stats = psutil.net_if_stats()
    return [
        f"{iface} {found.address.partition('%')[0]}"
        for iface, addresses in psutil.net_if_addrs().items()
        for found in addresses
        if found.family in (socket.AF_INET, socket.AF_INET6) and iface in stats and stats[iface].isup
    ][:_MAX_ADDRESSES]


def code_digest() -> str:
    """Return what is the same wherever the package's Python files are."""
    digest = hashlib.sha256()
    for path in _code_files():
        digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _code_files() -> Iterator[Path]:
    """Yield the package's own, not what else there may be in a checkout."""
    for folder in _CODE_FOLDERS:
        yield from sorted((_ROOT / folder).glob("*.py") if folder == "." else (_ROOT / folder).rglob("*.py"))


def _version(package: str) -> str:
    from importlib import metadata  # takes 8 ms, for which every launch on one node would wait too

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _why_no_directory(path: str) -> str:
    try:
        with os.scandir(path):
            return ""
    except OSError as error:
        return f"{path}: {error.strerror}"


def _read_script(examine: Examine) -> tuple[str, str]:
    """Return why the script cannot be read, and its digest."""
    path = os.path.join(examine.cwd, examine.script)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as script:
            while chunk := script.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        return f"{path}: {error.strerror}", ""
    return "", digest.hexdigest()


def _file_limit() -> int:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return UNLIMITED if limit == resource.RLIM_INFINITY else limit


def _shared_bytes() -> int:
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0  # there is none


def _is_loopback_name(name: str) -> bool:
    """Say whether a name leads to loopback addresses alone; not where it leads nowhere, or nobody answers in time."""
    found: list[str] = []

    def look_up() -> None:
        try:
            found.extend(str(place[0]) for *_, place in socket.getaddrinfo(name, None))
        except OSError:
            return

    thread = threading.Thread(target=look_up, name="zspmd-look-up", daemon=True)
    thread.start()
    thread.join(_LOOK_UP_S)
    return bool(found) and all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in list(found))
