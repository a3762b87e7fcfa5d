"""Where secrets might be seen on the hosts of a ``Cluster``, and looking for them there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from support.cluster import Cluster
from zmq.utils import z85


def forms_of(secret: bytes) -> set[bytes]:
    """Return how a key may be written: as it is, in Z85 as libzmq takes it, in binary, in hexadecimal digits."""
    forms = {secret, secret.hex().encode()}
    if len(secret) == 40:
        forms |= {z85.decode(secret), z85.decode(secret).hex().encode()}
    return forms


def find(needles: Iterable[bytes], cluster: Cluster, files: Iterable[Path]) -> set[str]:
    """Return in what kinds of places any of these bytes are: "cmdline", "environ", "files", and "run", the launches' directories."""
    wanted = list(needles)
    return {kind for kind, data in _places(cluster, files) if any(needle in data for needle in wanted)}


def _places(cluster: Cluster, files: Iterable[Path]) -> Iterator[tuple[str, bytes]]:
    for host in cluster.hosts:
        for pid in host.killable():
            for kind in ("cmdline", "environ"):
                yield kind, _read(Path(f"/proc/{pid}/{kind}"))
        for path in host.path("/run").rglob("*"):
            yield "run", str(path).encode() + _read(path)
    for path in files:
        yield "files", _read(path)


def _read(path: Path) -> bytes:
    with contextlib.suppress(OSError):  # it has ended, or is a socket
        if path.is_file():
            return path.read_bytes()
    return b""
