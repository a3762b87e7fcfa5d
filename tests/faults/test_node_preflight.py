"""Hosts that cannot be used as they are: no rank is started, each is told with what to do, and nothing is left."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster
from support.node_launch import NodeLaunch
from support.sshd import SshServers

import zspmd

SHARED = "make that directory there, or start from one that all nodes share"
WORKS = "this must print 'works' and ask nothing: ssh -F {config} -o BatchMode=yes {host} 'echo works'"


def refused(cluster: Cluster, rsh: str, hosts: list[str], *, fine: str = "", **options: Any) -> list[list[str]]:
    """Return the problems for which a driver starts no rank; ``fine`` are the hosts that have none."""
    with NodeLaunch(cluster, rsh, hosts=hosts, slots=[1] * len(hosts), **options) as launch:
        launch.finish()
    cluster.check_nothing_left(5.0)
    (failed,) = launch.told("failed")
    assert failed["kind"] == "PreflightError", failed["text"]
    first, _, *rows = failed["text"].splitlines()
    problems: list[list[str]] = failed["problems"]
    num_wrong = len({host for host, *_ in problems})
    assert first == f"no rank was started: {num_wrong} of {len(hosts)} hosts cannot be used as they are"
    assert len(rows) == len(problems) + bool(fine)
    if fine:
        assert rows[-1] == f"  fine: {fine}"
    assert launch.told("log") == []
    assert launch.errors == ""
    return problems


def interpreter(path: Path, body: str) -> str:
    """Write an interpreter for a host that does something first, or instead."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def client_settings(path: Path, settings: dict[str, tuple[str, int, SshServers]]) -> str:
    """Write an ssh client's settings: by the name that a user gives, a host, a port and the settings to be had there."""
    for name, (host, port, servers) in settings.items():
        with path.open("a") as file:
            file.write(f"Host {name}\nHostName {host}\nPort {port}\nInclude {servers.directory}/config\n")
    return str(path)


@pytest.mark.usefixtures("needs_sshd")
def test_hosts_on_which_no_agent_answers(cluster: Cluster, tmp_path: Path) -> None:
    old = interpreter(tmp_path / "old", 'echo Welcome!; echo "ZSPMD/1 0.0.1 4711"; exec cat')
    with (
        SshServers(cluster) as good,
        SshServers(cluster, port=2222, accepts_keys=False) as locked,
        SshServers(cluster, port=2223, is_known=False) as unknown,
    ):
        ways = {
            "asks": ("node1", 2222, locked),
            "unknown": ("node1", 2223, unknown),
            "refuses": ("node1", 2224, good),
            "old": ("node2", 22, good),
            "without-python": ("node2", 22, good),
        }
        config = client_settings(tmp_path / "config", ways)
        hosts = ["node0", "no-such-host", "asks", "unknown", "refuses", f"old python={old}", "without-python python=/no/such/python"]
        *problems, old_problem, python_problem = refused(cluster, f"ssh -F {config}", hosts, fine="node0")
    said = {
        "no-such-host": "ssh: Could not resolve hostname no-such-host: ",
        "asks": "root@node1: Permission denied (password).",
        "unknown": "Host key verification failed.",
        "refuses": "ssh: connect to host node1 port 2224: Connection refused",
    }
    assert [host for host, *_ in problems] == list(said)
    for host, check, text, advice in problems:
        assert (check, advice) == ("agent", WORKS.format(config=config, host=host))
        assert text.startswith(f"ssh {host} exited with code 255: {said[host]}")
        assert text.endswith(said[host]) or host == "no-such-host"  # a resolver's own words follow
    assert old_problem == [
        "old",
        "agent",
        f"it runs zspmd 0.0.1, the driver {zspmd.__version__}; install the same version there; its login printed: Welcome!",
        "install the same zspmd there, or name the interpreter that has it: --remote-python, python= in its line",
    ]
    assert python_problem[:2] == ["without-python", "agent"]
    assert python_problem[2].startswith("ssh without-python exited with code 127: sh: ")
    assert python_problem[2].endswith("/no/such/python: not found")
    assert python_problem[3] == "there is no such interpreter; name one: --remote-python, python= in its line"


def test_hosts_that_differ_from_the_driver_s(cluster: Cluster, rsh: str, tmp_path: Path) -> None:
    metadata = tmp_path / "torch-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    other = interpreter(tmp_path / "other", f'PYTHONPATH={tmp_path} exec {sys.executable} "$@"')
    cluster.read(0, ["mkdir", "/run/only-here"])
    again = cluster.hosts[2].address
    hosts = ["node0", f"node1 python={other}", "node2", again]
    torch, *problems = refused(cluster, rsh, hosts, fine="node0", cwd="/run/only-here")
    assert torch[:2] == ["node1", "torch"]
    assert torch[2].startswith("9.9.9, node0 has ")
    assert torch[3].startswith(f"{sys.executable} -m pip install torch==")
    absent = ["cwd", "/run/only-here: No such file or directory", SHARED]
    assert problems == [
        *([host, *absent] for host in ("node1", "node2", again)),
        [
            again,
            "same host",
            "is the same machine as node2 (node2)",
            "write one entry with the slots of both, or allow it: --allow-same-host",
        ],
    ]


def test_addresses_that_a_host_has_not_or_nobody_reaches(cluster: Cluster, rsh: str) -> None:
    has = [f"eth0 {host.address}" for host in cluster.hosts]
    assert refused(cluster, rsh, ["node0", "node1 addr=127.0.0.1", "node2 addr=192.0.2.1"], fine="node0") == [
        ["node1", "address", "addr=127.0.0.1 is a loopback address, which no other node reaches", f"write one of {has[1]}"],
        ["node2", "address", f"addr=192.0.2.1 is none of its addresses, which are {has[2]}", "write one of them, or leave addr= out"],
    ]


def test_a_firewall_between_two_hosts(cluster: Cluster, rsh: str) -> None:
    """ssh passes it, and data would not."""
    cluster.block(1, 2, but_system_ports=True)
    problems = refused(cluster, rsh, ["node0", "node1", "node2"], fine="node0")
    dropped = "a firewall drops it or the way back is missing: open TCP from {} to {}, "
    advice = f"{dropped}or choose another network: --iface, or addr= in the hostfile"
    for (host, check, text, told), origin, target in zip(problems, (1, 2), (2, 1), strict=True):
        address = cluster.hosts[target].address
        assert (host, check, told) == (f"node{origin}", "tcp", advice.format(f"node{origin}", address))
        assert text.startswith(f"node{target} at {address} port ")
        assert text.endswith(": no answer within 5 s")


def test_names_that_lead_to_loopback_do_no_harm(cluster: Cluster, rsh: str) -> None:
    """Debian's installer gives a machine's own name 127.0.1.1 in its /etc/hosts."""
    for host in cluster.hosts[:2]:
        host.hosts_file.write_text(host.hosts_file.read_text().replace(f"{host.address} {host.name}\n", f"127.0.1.1 {host.name}\n"))
    with NodeLaunch(cluster, rsh, slots=(1, 1)) as launch:
        ready = launch.wait("ready")
        launch.order("call", "place")
        places = launch.wait("answered")["answer"]
        launch.order("close")
        launch.finish()
    assert [node["address"] for node in ready["plan"]] == [host.address for host in cluster.hosts[:2]]
    assert [place["environment"]["MASTER_ADDR"] for place in places] == [cluster.hosts[0].address] * 2


def test_hosts_that_are_this_machine_need_no_way_to_any(cluster: Cluster) -> None:
    with NodeLaunch(cluster, "/no/such/ssh", slots=(2,)) as launch:
        assert [node["is_local"] for node in launch.wait("ready")["plan"]] == [True]
        assert cluster.listeners(0) == set()
        launch.order("close")
        launch.finish()
    assert launch.told("failed") == []


def test_a_command_that_is_not_installed_is_told(cluster: Cluster) -> None:
    with NodeLaunch(cluster, "/no/such/ssh", slots=(1, 1)) as launch:
        launch.finish()
    (failed,) = launch.told("failed")
    assert failed["kind"] == "ConfigError"
    assert failed["text"].startswith("'/no/such/ssh' is not installed: ")
    assert failed["text"].endswith("; install it, or name another command by --rsh")
