"""Launches over several nodes that cannot start: every host that is the reason is named with what to do, and no rank was started."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cluster import Cluster
from support.cluster_host import ClusterHost
from support.polling import block_until
from support.script_nodes import PIPES, ScriptNodes
from support.script_nodes import script_nodes as script_nodes
from support.sshd import SshServers

from zspmd.runtime.launch.ports import first_candidate

PYTHON = [sys.executable, "-I", "-S", "-c"]
STARTED = "touch started-$RANK; hostname"
PACKAGE = Path(__file__).parents[2]


def check_refused(nodes: ScriptNodes, *arguments: str, rsh: str | None = None, cwd: Path | None = None) -> str:
    """Assert that a launch ends with 120 before a rank is started, and return the table of hosts."""
    ended = nodes.run(*(arguments or ("--no-python", "sh", "-c", STARTED)), rsh=rsh, cwd=cwd or nodes.directory)
    assert ended.code == 120, ended.errors
    assert ended.out == ""
    assert list(nodes.directory.glob("started-*")) == []
    nodes.cluster.check_nothing_left(2.0)
    return ended.errors


def check_fine(nodes: ScriptNodes, *arguments: str, rsh: str | None = None) -> None:
    """Assert that a launch runs on all hosts."""
    ended = nodes.run(*arguments, "--no-python", "sh", "-c", STARTED, rsh=rsh)
    assert ended.code == 0, ended.errors
    assert sorted(line.partition("] ")[2] for line in ended.out.splitlines()) == ["node0", "node0", "node1", "node2"]


def rows(table: str, host: str) -> list[str]:
    """Return the lines of a host in a table of problems."""
    return [line.strip() for line in table.splitlines() if re.match(rf" +(\w+@)?{host} ", line)]


def row(table: str, host: str) -> str:
    """Return the one line of a host."""
    [line] = rows(table, host)
    return line


# --- addresses ---


@pytest.mark.parametrize("index", [0, 1], ids=["the launcher's", "another"])
def test_a_host_whose_own_name_is_loopback_is_reached_all_the_same(script_nodes: ScriptNodes, index: int) -> None:
    """As Debian's installer leaves it; nobody is told a name."""
    host = script_nodes.hosts[index]
    others = "".join(f"{other.address} {other.name}\n" for other in script_nodes.hosts if other is not host)
    host.hosts_file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{others}")
    ended = script_nodes.run("--no-python", "sh", "-c", "echo $MASTER_ADDR")
    assert ended.code == 0, ended.errors
    assert {line.partition("] ")[2] for line in ended.out.splitlines()} == {script_nodes.hosts[0].address}


def test_a_loopback_address_that_is_asked_for_is_refused_with_the_fix(script_nodes: ScriptNodes) -> None:
    script_nodes.hostfile = "node0 slots=2\nnode1 addr=127.0.1.1\nnode2\n"
    told = row(check_refused(script_nodes), "node1")
    assert "127.0.1.1" in told
    assert "addr=" in told


def test_the_wrong_interface_is_named_with_its_addresses(script_nodes: ScriptNodes) -> None:
    for index in range(3):
        script_nodes.cluster.add_interface(index, "wrong0", f"192.168.{index + 5}.1/24")
    table = check_refused(script_nodes, "--iface", "wrong0", "--no-python", "sh", "-c", STARTED)
    for index in range(3):
        told = rows(table, f"node{index}")
        assert len(told) >= 2, table
        for line in told:
            assert re.search(r" at 192\.168\.[567]\.1 port \d+: Network is unreachable", line), table
            assert "choose another network: --iface" in line


def test_an_interface_that_one_host_lacks_is_named_with_those_that_it_has(script_nodes: ScriptNodes) -> None:
    for index in (0, 2):
        script_nodes.cluster.add_interface(index, "other0", f"192.168.7.{index + 1}/24")
    told = row(check_refused(script_nodes, "--iface", "other0", "--no-python", "sh", "-c", STARTED), "node1")
    assert "other0" in told
    assert "eth0" in told


def test_a_firewall_between_two_hosts_is_named_from_both_ends(script_nodes: ScriptNodes) -> None:
    script_nodes.cluster.block(1, 2, but_system_ports=True)
    table = check_refused(script_nodes)
    for index, other in ((1, 2), (2, 1)):
        assert script_nodes.hosts[other].address in row(table, f"node{index}")
        assert "firewall" in row(table, f"node{index}")
    assert "fine: node0" in table


# --- ssh ---


def test_a_server_that_is_not_there_is_named_and_the_others_are_fine(script_nodes: ScriptNodes, ssh_servers: SshServers) -> None:
    ssh_servers.stop(1)
    table = check_refused(script_nodes, rsh=ssh_servers.command)
    assert "Connection refused" in row(table, "node1")
    assert "-o BatchMode=yes node1" in row(table, "node1")
    assert re.search(r"fine: node0.*node2", table)


@pytest.mark.usefixtures("needs_sshd")
@pytest.mark.parametrize(
    ("accepts_keys", "is_known", "said"),
    [
        pytest.param(False, True, "Permission denied (password)", id="asks for a password"),
        pytest.param(True, False, "Host key verification failed", id="unknown host key"),
    ],
)
def test_servers_that_would_ask_are_named(script_nodes: ScriptNodes, accepts_keys: bool, is_known: bool, said: str) -> None:
    with SshServers(script_nodes.cluster, accepts_keys=accepts_keys, is_known=is_known) as servers:
        table = check_refused(script_nodes, rsh=servers.command)
    assert said in row(table, "node1")
    assert said in row(table, "node2")


def test_what_a_login_prints_is_no_trouble(script_nodes: ScriptNodes, ssh_servers: SshServers) -> None:
    with login_file(script_nodes.hosts[1], r"printf 'Welcome!\nZSPMD is fine\n\001\377 no newline'; echo quota >&2" + "\n"):
        check_fine(script_nodes, rsh=ssh_servers.command)


def test_a_login_that_exits_is_named_with_what_it_said(script_nodes: ScriptNodes, ssh_servers: SshServers) -> None:
    with login_file(script_nodes.hosts[2], "echo 'This machine is for Lee.'; exit 3\n"):
        told = row(check_refused(script_nodes, rsh=ssh_servers.command), "node2")
    assert "exited with code 3" in told
    assert "This machine is for Lee." in told


@pytest.mark.usefixtures("needs_sshd")
def test_a_server_with_too_many_logins_is_tried_again(script_nodes: ScriptNodes) -> None:
    """Two strangers who never say anything take both places of each server, until the first refusal was written down."""
    crowd = """
import socket
kept = [socket.create_connection((name, 22)) for name in ("node1", "node2") for _ in range(2)]
print("up", flush=True)
input()
"""
    with SshServers(script_nodes.cluster, max_startups=2) as servers:
        strangers = script_nodes.cluster.run(0, [*PYTHON, crowd], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert strangers.stdout is not None
        assert strangers.stdout.readline() == b"up\n"
        launch = script_nodes.begin("--no-python", "sh", "-c", STARTED, rsh=servers.command)
        block_until(lambda: all("MaxStartups" in servers.log(index) for index in (1, 2)))
        strangers.kill()
        out, errors = launch.communicate(timeout=30)
        assert launch.returncode == 0, errors
        assert len(out.splitlines()) == 4


class login_file:
    """What bash reads at a login by ssh, for commands too."""

    def __init__(self, host: ClusterHost, text: str) -> None:
        self._path, self._text = host.home / ".bashrc", text

    def __enter__(self) -> None:
        self._path.write_text(self._text)

    def __exit__(self, *_: object) -> None:
        self._path.unlink()


# --- what nodes must have in common ---


@pytest.fixture
def wrapped_python(script_nodes: ScriptNodes) -> str:
    """Have node1 find other packages: what is put into ``modules`` comes first there. Returns its interpreter."""
    (script_nodes.directory / "modules").mkdir()
    path = script_nodes.directory / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={script_nodes.directory}/modules exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_host_with_another_version_of_a_package_is_named(script_nodes: ScriptNodes, wrapped_python: str) -> None:
    facts = script_nodes.directory / "modules" / "msgpack-0.0.7.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: msgpack\nVersion: 0.0.7\n")
    script_nodes.hostfile = f"node0 slots=2\nnode1 python={wrapped_python}\nnode2\n"
    told = row(check_refused(script_nodes), "node1")
    assert "msgpack" in told
    assert "0.0.7" in told


def test_a_host_with_another_version_of_zspmd_is_named(script_nodes: ScriptNodes, wrapped_python: str) -> None:
    package = script_nodes.directory / "modules" / "zspmd"
    package.mkdir()
    for entry in PACKAGE.iterdir():
        if (entry.suffix == ".py" and entry.name != "__init__.py") or entry.name in ("runtime", "transport"):
            (package / entry.name).symlink_to(entry)
    source = (PACKAGE / "__init__.py").read_text()
    (package / "__init__.py").write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.0.7"', source))
    script_nodes.hostfile = f"node0 slots=2\nnode1 python={wrapped_python}\nnode2\n"
    told = row(check_refused(script_nodes), "node1")
    assert "zspmd 0.0.7" in told
    assert "install the same" in told


def test_a_host_without_the_interpreter_is_named(script_nodes: ScriptNodes) -> None:
    script_nodes.hostfile = "node0 slots=2\nnode1\nnode2 python=/opt/nowhere/bin/python\n"
    told = row(check_refused(script_nodes), "node2")
    assert "/opt/nowhere/bin/python" in told
    assert "--remote-python" in told


def test_hosts_without_the_directory_and_with_another_script_are_named_each_on_a_line(script_nodes: ScriptNodes) -> None:
    """``/run`` is each host's own."""
    for host, text in zip(script_nodes.hosts, ("print(1)\n", "print(2)\n", None)):
        if text is not None:
            host.path("/run/job").mkdir()
            host.path("/run/job/train.py").write_text(text)
    table = check_refused(script_nodes, "train.py", cwd=Path("/run/job"))
    assert "script" in row(table, "node1")
    assert "another file" in row(table, "node1")
    assert any("cwd" in line and "/run/job" in line for line in rows(table, "node2")), table
    for host in script_nodes.hosts:
        shutil.rmtree(host.path("/run/job"), ignore_errors=True)  # of node2 there is none


# --- ports ---


def serve(cluster: Cluster, index: int, address: str, port: int) -> subprocess.Popen[bytes]:
    """Have a host listen."""
    code = f"import socket, sys; kept = socket.create_server(({address!r}, {port})); sys.stdin.read()"
    process = cluster.run(index, [*PYTHON, code], stdin=subprocess.PIPE)
    block_until(lambda: (address or "0.0.0.0", port) in cluster.listeners(index))
    return process


MASTER = ("--no-python", "sh", "-c", "echo $MASTER_ADDR $MASTER_PORT")


@pytest.mark.parametrize("index", [0, 1], ids=["the launcher's host", "another host"])
def test_a_master_port_that_is_taken_is_named_with_who_has_it(script_nodes: ScriptNodes, index: int) -> None:
    server = serve(script_nodes.cluster, index, "", 23456)
    hosts = [f"{host.name}\n" for host in script_nodes.hosts]
    script_nodes.hostfile = "".join([hosts[index], *hosts[:index], *hosts[index + 1 :]])
    ended = script_nodes.run("--master-port", "23456", *MASTER)
    server.kill()
    assert ended.code == 120
    assert f"port 23456 of {script_nodes.hosts[index].address} is taken by pid {server.pid} (" in ended.errors


@pytest.mark.parametrize("how", ["listens", "listens at another address", "TIME_WAIT"])
def test_a_port_that_follows_from_the_id_and_is_taken_is_passed_over(script_nodes: ScriptNodes, how: str) -> None:
    port = first_candidate("passed-over", "master")
    if how == "TIME_WAIT":
        code = f"""
import socket
address = ({script_nodes.hosts[0].address!r}, {port})
with socket.create_server(address) as server, socket.create_connection(address) as client:
    server.accept()[0].close()
    client.recv(1)
"""
        script_nodes.cluster.read(0, [*PYTHON, code])
    else:
        serve(script_nodes.cluster, 0, "" if how == "listens" else "127.0.0.1", port)
    ended = script_nodes.run("--launch-id", "passed-over", *MASTER)
    assert ended.code == 0, ended.errors
    assert {line.partition("] ")[2] for line in ended.out.splitlines()} == {f"{script_nodes.hosts[0].address} {port + 1}"}
    script_nodes.cluster.kill(0)


def test_the_port_cannot_be_taken_between_plan_and_server(script_nodes: ScriptNodes) -> None:
    """A program that does not share binds in vain; one that torch's store is like, on rank 0's node, has it at once."""
    serves = "import os, socket; socket.create_server(('', int(os.environ['MASTER_PORT']))); print('served', flush=True)"
    rank_0 = f"echo $MASTER_PORT > port; {script_nodes.when_told(shlex.join([*PYTHON, serves]))}"
    process = script_nodes.begin(*script_nodes.by_rank({0: rank_0}, others=script_nodes.when_told("exit 0")), num_ready=4)
    port = script_nodes.pid("port")
    thief = f"import socket; s = socket.socket(); print(s.connect_ex(('', {port}))); s = socket.socket(); s.bind(('', {port}))"
    stolen = script_nodes.cluster.run(0, [*PYTHON, thief], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, errors = stolen.communicate(timeout=10)
    script_nodes.go()
    told, _ = process.communicate(timeout=20)
    assert "Address already in use" in errors
    assert int(out) != 0  # nothing listens there
    assert process.returncode == 0
    assert "[0@node0] served" in told


def colliding_ids(count: int) -> list[str]:
    """Return launch ids whose first candidate is the same port."""
    found: dict[int, list[str]] = {}
    number = 0
    while True:
        launch_id = f"collides-{number}"
        ids = found.setdefault(first_candidate(launch_id, "master"), [])
        ids.append(launch_id)
        if len(ids) == count:
            return ids
        number += 1


@pytest.mark.parametrize("count", [3, pytest.param(16, marks=pytest.mark.long)])
def test_launches_at_once_over_the_same_hosts_share_no_port(script_nodes: ScriptNodes, count: int) -> None:
    """The last of them runs on the first host alone, and its servers would listen on all addresses too."""
    *ids, alone = colliding_ids(count)
    command = ["--no-python", "sh", "-c", f"echo $MASTER_PORT; {script_nodes.when_told('exit 0')}"]
    launches = [script_nodes.begin("--launch-id", launch_id, *command) for launch_id in ids]
    single = [*script_nodes.run_argv, "--launch-id", alone, "-n", "2", *command]
    launches.append(script_nodes.cluster.run(0, single, cwd=script_nodes.directory, **PIPES))
    ports = [read_port(launch) for launch in launches]
    assert len(set(ports)) == count
    script_nodes.go()
    for launch in launches:
        _, errors = launch.communicate(timeout=60)
        assert launch.returncode == 0, errors


def read_port(launch: subprocess.Popen[str]) -> int:
    assert launch.stdout is not None
    for line in launch.stdout:
        word = line.rstrip().rpartition(" ")[2]
        if word.isdigit():
            return int(word)
    raise AssertionError(launch.communicate()[1])
