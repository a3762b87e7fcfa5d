"""``zspmd-run doctor`` over hosts with a fault between them or on one of them: it names the host, the check and the fix."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

from support.cluster import Cluster
from support.script_runs import RUN

DEADLINE_S = 60.0


def examine(cluster: Cluster, hostfile: Path, *options: str) -> tuple[int, list[dict[str, str]]]:
    """Run it on node0 with all hosts of the cluster; returns its exit code and checks."""
    hostfile.write_text(cluster.hostfile([2, 1, 1]))
    argv = [*RUN, "--rsh", cluster.rsh(), *options, "doctor", "--json", "--hostfile", str(hostfile)]
    process = cluster.run(0, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert output, errors
    told: list[dict[str, Any]] = json.loads(output)
    return process.returncode, told


def failed(told: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(check["host"], check["name"]) for check in told if check["status"] == "FAIL"]


def test_a_firewall_between_two_hosts_is_found_from_both(cluster: Cluster, tmp_path: Path) -> None:
    cluster.block(1, 2)
    started = time.monotonic()
    code, told = examine(cluster, tmp_path / "hosts")
    assert (code, failed(told)) == (1, [("node1", "tcp"), ("node2", "tcp")])
    assert time.monotonic() - started < 30.0
    first, second = (check for check in told if check["status"] == "FAIL")
    assert first["text"].startswith(f"node2 at {cluster.hosts[2].address} port ")
    assert first["text"].endswith(": no answer within 5 s")
    assert f"open TCP from node1 to {cluster.hosts[2].address}" in first["advice"]
    assert second["text"].startswith(f"node1 at {cluster.hosts[1].address} port ")
    (tcp,) = (check for check in told if check["host"] == "node0" and check["name"] == "tcp")
    assert tcp["text"] == "reaches the driver, node1, node2"


def test_a_host_that_is_cut_off_and_one_with_its_own_name_on_loopback(cluster: Cluster, tmp_path: Path) -> None:
    """Debian's /etc/hosts does the second; it is a note, since ranks are told their interface."""
    hosts_file = cluster.hosts[1].hosts_file
    whole = hosts_file.read_text()
    cluster.cut(2)
    try:
        hosts_file.write_text("127.0.0.1 localhost\n127.0.1.1 node1\n")
        code, told = examine(cluster, tmp_path / "hosts")
    finally:
        hosts_file.write_text(whole)
    assert (code, failed(told)) == (1, [("node2", "agent")])
    (name,) = (check for check in told if check["host"] == "node1" and check["name"] == "name")
    assert (name["status"], name["text"]) == ("warn", "its name node1 leads to loopback addresses alone")
    (tcp,) = (check for check in told if check["host"] == "node1" and check["name"] == "tcp")
    assert tcp["text"] == "reaches the driver, node0"


def test_a_wrong_interface_is_told_with_what_there_is(cluster: Cluster, tmp_path: Path) -> None:
    code, told = examine(cluster, tmp_path / "hosts", "--iface", "lo")
    assert (code, failed(told)) == (1, [("node0", "address"), ("node1", "address"), ("node2", "address")])
    texts = [check["text"] for check in told if check["status"] == "FAIL"]
    assert texts == [f"--iface lo fits none of its addresses, which are eth0 {host.address}" for host in cluster.hosts]
