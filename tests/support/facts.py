"""Facts of nodes, as an agent would tell them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zspmd.runtime.launch.nodes.node_facts import CODE, NodeFacts

VERSIONS = {"zspmd": "0.1.0", CODE: "aaaaaaaaaaaa", "torch": "2.13.0", "pyzmq": "27.1.0", "msgpack": "1.2.3", "numpy": "2.4.6"}
FACTS = NodeFacts(
    hostname="node0",
    python_version="3.11.7",
    executable="/opt/py/bin/python",
    versions=VERSIONS,
    boot_id="boot-0",
    network_id="1",
    addresses=("lo 127.0.0.1", "lo ::1", "eth0 10.0.0.1", "eth0 fe80::1"),
    cores=8,
    cuda_devices=0,
    script_sha256="1" * 64,
    file_limit=4096,
    shared_bytes=1 << 30,
)


def facts(number: int = 1, /, *, versions: dict[str, str] | None = None, **changes: Any) -> NodeFacts:
    """Return the facts of node ``number``, with its own boot id and address, changed as said."""
    own = {"hostname": f"node{number}", "boot_id": f"boot-{number}", "addresses": ("lo 127.0.0.1", f"eth0 10.0.0.{number + 1}")}
    return replace(FACTS, **{**own, "versions": {**VERSIONS, **(versions or {})}, **changes})
