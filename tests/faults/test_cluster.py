"""The hosts on which several nodes are tested: they are apart, what happens to them happens, and nothing of them is left."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster
from support.cluster_host import NoClusterError
from support.host_proc import comm_of, command_of
from support.node_faults import carriers, kill, named, paused, ranks, wait_named
from support.polling import block_until
from support.sshd import SshServers

PYTHON = [sys.executable, "-I", "-S", "-c"]
CONNECT = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 0.3).recv(9).decode())"
SERVE = """
import socket
server = socket.create_server((ADDRESS, PORT))
kept = []
while True:
    kept.append(server.accept()[0])
    kept[-1].send(b"hello")
"""
NAMED = """
import os, signal
for name in ("zspmd-agent", "zspmd-rank3"):
    open("/proc/self/comm", "w").write(name)
    if os.fork():
        signal.pause()
open("/proc/self/comm", "w").write("script")
signal.pause()
"""


def serve(cluster: Cluster, index: int, port: int) -> None:
    """Have a host answer "hello" on a port."""
    address = (cluster.hosts[index].address, port)
    cluster.run(index, [*PYTHON, SERVE.replace("ADDRESS, PORT", repr(address)[1:-1])])
    block_until(lambda: address in cluster.listeners(index))


def ask(cluster: Cluster, index: int, other: int, port: int) -> str:
    """Return the last line of what comes of asking a host from another: its answer or the error."""
    argv = [*PYTHON, CONNECT, cluster.hosts[other].name, str(port)]
    process = cluster.run(index, argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return str(process.communicate(timeout=10)[0]).strip().splitlines()[-1]


def remote(cluster: Cluster, client: str, target: str, command: str, **popen: Any) -> subprocess.Popen[Any]:
    """Start a command on another host from the first one."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return cluster.run(0, [*shlex.split(client), "-T", "-o", "BatchMode=yes", target, command], **{**pipes, **popen})


@pytest.fixture(params=["rsh", "ssh"])
def client(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """What a driver is given as ``--rsh``."""
    if request.param == "rsh":
        return cluster.rsh()
    servers: SshServers = request.getfixturevalue("ssh_servers")
    return servers.command


def test_hosts_are_apart_and_know_each_other_by_name(cluster: Cluster) -> None:
    for index, host in enumerate(cluster.hosts):
        assert cluster.read(index, ["hostname"]).strip() == host.name
        assert cluster.read(index, ["ls", "/sys/class/net"]).split() == ["eth0", "lo"]
        assert cluster.read(index, ["sh", "-c", 'echo "$XDG_RUNTIME_DIR"; pwd']).split() == [f"/run/user/{os.getuid()}", os.getcwd()]
    cluster.read(1, ["touch", "/dev/shm/only-here", "/run/only-here"])
    assert [len(list(host.path("/dev/shm").iterdir())) for host in cluster.hosts] == [0, 1, 0]
    assert not Path("/run/only-here").exists()
    cluster.hosts[1].path("/dev/shm/only-here").unlink()
    serve(cluster, 1, 7000)
    assert ask(cluster, 0, 1, 7000) == ask(cluster, 2, 1, 7000) == "hello"
    assert cluster.listeners(1) == {(cluster.hosts[1].address, 7000)}
    assert cluster.listeners(0) == set()
    cluster.kill(1)


def test_loopback_and_wildcard_listeners_are_told_as_people_write_them(cluster: Cluster) -> None:
    code = (
        "import socket, time; kept = [socket.create_server((a, 7000 + i), family=f) for i, (a, f) in enumerate(ADDRESSES)]; time.sleep(600)"
    )
    code = code.replace("ADDRESSES", "(('127.0.0.1', 2), ('0.0.0.0', 2), ('::1', 10), ('::', 10))")
    cluster.run(2, [*PYTHON, code])
    block_until(lambda: len(cluster.listeners(2)) == 4)
    assert cluster.listeners(2) == {("127.0.0.1", 7000), ("0.0.0.0", 7001), ("::1", 7002), ("::", 7003)}
    cluster.kill(2)


def test_a_host_gets_another_interface_and_other_names_until_the_next_test(cluster: Cluster) -> None:
    cluster.add_interface(1, "wrong0", "192.168.7.1/24")
    cluster.hosts[1].hosts_file.write_text("127.0.1.1 node1\n")
    assert "192.168.7.1/24" in cluster.read(1, ["ip", "address", "show", "wrong0"])
    assert cluster.read(1, ["getent", "hosts", "node1"]).split() == ["127.0.1.1", "node1"]
    cluster.reset()
    assert cluster.read(1, ["ls", "/sys/class/net"]).split() == ["eth0", "lo"]
    assert cluster.read(1, ["getent", "hosts", "node1"]).split() == [cluster.hosts[1].address, "node1"]


@pytest.mark.parametrize("at", ["switch", "host"])
def test_a_cut_host_is_reached_by_nobody_until_it_is_healed(cluster: Cluster, at: str) -> None:
    serve(cluster, 1, 7000)
    serve(cluster, 2, 7000)
    cluster.cut(1, at=at)
    assert "timed out" in ask(cluster, 0, 1, 7000)
    assert ("timed out" if at == "switch" else "Network is unreachable") in ask(cluster, 1, 0, 7000)
    assert ask(cluster, 0, 2, 7000) == "hello"
    cluster.heal(1)
    block_until(lambda: ask(cluster, 0, 1, 7000) == "hello")
    cluster.kill(1)
    cluster.kill(2)


def test_a_firewall_loses_in_silence_all_but_system_ports(cluster: Cluster) -> None:
    serve(cluster, 1, 7000)
    serve(cluster, 1, 700)
    serve(cluster, 0, 7000)
    cluster.block(0, 1, but_system_ports=True)
    assert "timed out" in ask(cluster, 0, 1, 7000)
    assert "timed out" in ask(cluster, 1, 0, 7000)
    assert ask(cluster, 0, 1, 700) == "hello"
    assert ask(cluster, 2, 1, 7000) == "hello"
    assert cluster.read(0, [*shlex.split(cluster.rsh()), "node1", "echo through"]).strip() == "through"
    cluster.unblock(0)
    cluster.block(0, 1)
    assert "timed out" in ask(cluster, 0, 1, 700)
    cluster.unblock(0)
    assert ask(cluster, 0, 1, 7000) == "hello"
    cluster.kill(0)
    cluster.kill(1)


def test_a_host_without_power_says_nothing_and_comes_back_empty(cluster: Cluster) -> None:
    serve(cluster, 1, 7000)
    code = "import socket; s = socket.create_connection(('node1', 7000)); s.recv(9); print('up', flush=True); s.recv(9); print('told')"
    connected = cluster.run(0, [*PYTHON, code], stdout=subprocess.PIPE, text=True)
    assert connected.stdout is not None
    assert connected.stdout.readline() == "up\n"
    cluster.power_off(1)
    assert cluster.processes(1) == []
    with pytest.raises(subprocess.TimeoutExpired):
        connected.wait(0.3)
    cluster.heal(1)
    assert cluster.listeners(1) == set()
    cluster.kill(0)


def test_a_command_elsewhere_has_its_streams_its_exit_code_and_few_variables(cluster: Cluster, client: str) -> None:
    command = "hostname; cat; echo problem >&2; env >&2; exit 7"
    process = remote(cluster, client, f"root@{cluster.hosts[1].address}", command, text=True, env={"SECRET": "1"})
    output, errors = process.communicate("one\ntwo\n", timeout=10)
    assert (output, process.returncode) == ("node1\none\ntwo\n", 7)
    first, *variables = errors.splitlines()
    assert first == "problem"
    assert {f"HOME={cluster.hosts[1].home}", "USER=root", f"XDG_RUNTIME_DIR=/run/user/{os.getuid()}"} <= set(variables)
    assert [line.split()[2:] for line in variables if line.startswith("SSH_CONNECTION=")] == [[cluster.hosts[1].address, "22"]]
    assert not [line for line in variables if line.startswith(("SECRET", "ZSPMD", "PYTEST"))]


def test_a_megabyte_goes_there_and_back(cluster: Cluster, client: str) -> None:
    sent = os.urandom(1 << 20)
    process = remote(cluster, client, "node2", "cat")
    assert process.communicate(sent, timeout=10) == (sent, b"")
    assert process.returncode == 0


def test_an_unknown_host_is_said_as_ssh_says_it(cluster: Cluster, client: str) -> None:
    process = remote(cluster, client, "elsewhere.invalid", "true", text=True)
    _, errors = process.communicate(timeout=10)
    assert "Could not resolve hostname elsewhere.invalid" in errors
    assert process.returncode == 255


def test_a_killed_client_leaves_the_other_side_the_end_of_its_input(cluster: Cluster, client: str) -> None:
    process = remote(cluster, client, "node1", "echo up; cat; touch /dev/shm/ended")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    block_until(lambda: len(cluster.processes(1)) >= 2)  # the shell says so first
    [pid] = carriers(cluster.hosts[0], "node1")
    assert pid == process.pid
    kill(pid)
    assert process.stdout.read() == b""
    ended = cluster.hosts[1].path("/dev/shm/ended")
    block_until(ended.exists)
    ended.unlink()


def test_a_cut_link_holds_the_bytes_back_and_nobody_is_told(cluster: Cluster, client: str) -> None:
    process = remote(cluster, client, "node1", "echo up; exec cat")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    cluster.cut(1)
    process.stdin.write(b"late\n")
    process.stdin.close()
    process.stdin = None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    assert named(cluster.hosts[1], "cat")
    cluster.heal(1)
    assert process.communicate(timeout=20)[0] == b"late\n"
    assert process.returncode == 0


def test_rsh_has_noise_before_the_command_and_a_delay(cluster: Cluster) -> None:
    started = time.monotonic()
    assert cluster.read(0, [*shlex.split(cluster.rsh(banner="Welcome!\n", delay_s=0.2)), "node1", "echo up"]) == "Welcome!\nup\n"
    assert 0.2 < time.monotonic() - started < 5


def test_ssh_has_noise_of_a_login_shell(cluster: Cluster, ssh_servers: SshServers) -> None:
    (cluster.hosts[1].home / ".bashrc").write_text("echo Welcome!\n")
    process = remote(cluster, ssh_servers.command, "node1", "echo up")
    (output, _) = process.communicate(timeout=10)
    (cluster.hosts[1].home / ".bashrc").unlink()
    assert output == b"Welcome!\nup\n"


def test_a_session_that_an_ssh_server_still_keeps_is_nothing_left_behind(cluster: Cluster, ssh_servers: SshServers) -> None:
    process = remote(cluster, ssh_servers.command, "node1", "echo up; read line")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    cluster.cut(1)
    kill(process.pid)
    [shell] = cluster.processes(1)
    kill(shell)
    sessions = cluster.hosts[1].killable()
    assert {comm_of(pid) for pid in sessions} == {"sshd"}
    cluster.check_nothing_left(0.1)
    cluster.kill(1)
    assert cluster.hosts[1].killable() == []


@pytest.mark.usefixtures("needs_sshd")
@pytest.mark.parametrize(
    ("accepts_keys", "is_known", "said"),
    [
        pytest.param(False, True, "Permission denied (password)", id="asks for a password"),
        pytest.param(True, False, "Host key verification failed", id="unknown host key"),
    ],
)
def test_ssh_servers_that_let_nobody_in(cluster: Cluster, accepts_keys: bool, is_known: bool, said: str) -> None:
    with SshServers(cluster, port=2222, accepts_keys=accepts_keys, is_known=is_known) as servers:
        process = remote(cluster, servers.command, "node1", "true", text=True)
        _, errors = process.communicate(timeout=10)
    assert said in errors
    assert process.returncode == 255


def test_an_ssh_server_refuses_when_stopped_and_serves_again_after_a_loss_of_power(cluster: Cluster, ssh_servers: SshServers) -> None:
    ssh_servers.stop(1)
    _, errors = remote(cluster, ssh_servers.command, "node1", "true", text=True).communicate(timeout=10)
    assert "Connection refused" in errors
    cluster.power_off(1)
    cluster.heal(1)
    ssh_servers.start(1)
    assert remote(cluster, ssh_servers.command, "node1", "true").wait(10) == 0


@pytest.mark.usefixtures("needs_sshd")
def test_an_ssh_server_drops_those_who_are_too_many_at_a_time(cluster: Cluster) -> None:
    code = "import socket; kept = [socket.create_connection(('node1', 22)) for _ in range(3)]; print(*(s.recv(3) for s in kept))"
    with SshServers(cluster, max_startups=2):
        assert cluster.read(0, [*PYTHON, code]).strip() == "b'SSH' b'SSH' b'Exc'"  # "Exceeded MaxStartups"


def test_processes_are_found_by_name_and_paused(cluster: Cluster) -> None:
    cluster.run(1, [*PYTHON, NAMED], env={"RANK": "5"})
    rank = wait_named(cluster.hosts[1], "zspmd-rank3")
    wait_named(cluster.hosts[1], "script")
    assert ranks(cluster.hosts[1]) == {3: rank}
    assert ranks(cluster.hosts[2]) == {}
    stat = Path(f"/proc/{rank}/stat")
    with paused(rank):
        assert stat.read_text().rpartition(")")[2].split()[0] == "T"
    block_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")
    kill(rank)
    block_until(lambda: named(cluster.hosts[1], "zspmd-rank3") == [])  # it has no command line a moment before it is a zombie
    cluster.kill(1)


@pytest.mark.usefixtures("shared_cluster")
@pytest.mark.parametrize("end", ["closed", "killed"])
def test_nothing_is_left_of_a_cluster(end: str) -> None:
    code = """
import signal, sys
sys.path.insert(0, sys.argv[1])
from support.cluster import Cluster
with Cluster(2) as cluster:
    cluster.run(1, ["sh", "-c", "setsid sleep 600 & setsid sleep 600"])
    while len(cluster.processes(1)) < 3:
        pass
    print(cluster.directory, *(host.pid for host in cluster.hosts), *cluster.processes(1), flush=True)
    sys.stdin.read()
"""
    argv = [sys.executable, "-c", code, str(Path(__file__).parents[1])]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        directory, *pids = process.stdout.readline().split()
        if end == "killed":
            process.kill()
        process.communicate(timeout=10)
    block_until(lambda: not any(command_of(int(pid)) for pid in pids))
    assert process.returncode == (-signal.SIGKILL if end == "killed" else 0)
    if end == "killed":
        with Cluster(1):
            assert not Path(directory).exists()
    assert not Path(directory).exists()


def test_without_root_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoClusterError, match="need root"), Cluster(1):
        pass
