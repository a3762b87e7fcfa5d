"""Ranks on several hosts, reached by real ssh: what they are told, what they compute, who listens, and who could read the keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster
from support.host_proc import own_listeners_of
from support.node_faults import AGENT, GUARD, named
from support.node_launch import NodeLaunch
from support.one_node_engine import REQUESTS, generate_here
from support.secret_places import find, forms_of
from support.sshd import PORT, SshServers

from zspmd.runtime.launch.devices import available_cores

FOREIGN = {
    "TORCHELASTIC_RUN_ID": "other",
    "SLURM_PROCID": "7",
    "OMPI_COMM_WORLD_RANK": "7",
    "PMI_RANK": "7",
    "SLURM_STEP_ID": "1",
    "PET_NNODES": "9",
}
LOGS = "/run/logs"  # each host has its own /run


def test_each_rank_is_told_where_it_is(cluster: Cluster, ssh_servers: SshServers) -> None:
    """A login shell that prints, and sets the facts of another launcher, changes nothing."""
    lines = ["echo Welcome!", "export OF_NODE1=1", *(f"export {name}=3" for name in FOREIGN)]
    bashrc = cluster.hosts[1].home / ".bashrc"
    bashrc.write_text("".join(f"{line}\n" for line in lines))
    given = {**FOREIGN, "TOKEN": "hidden", "HF_HOME": "/models", "EXTRA_1": "1", "OMP_NUM_THREADS": None}
    with NodeLaunch(cluster, ssh_servers.command, env=given, nodes={"environment": ["EXTRA_*"]}, log_dir=LOGS) as launch:
        ready = launch.wait("ready")
        launch.order("call", "place")
        places = launch.wait("answered")["answer"]
        logs = [sorted(path.name for path in host.path(LOGS).iterdir()) for host in cluster.hosts]
        directories = [[path.name for path in host.path("/run/user/0/zspmd").iterdir()] for host in cluster.hosts]
        launch.order("close")
        launch.finish()
    bashrc.unlink()
    assert launch.told("failed") == []
    addresses = [host.address for host in cluster.hosts]
    assert [node["address"] for node in ready["plan"]] == addresses
    assert [place["pid"] for place in places] == ready["pids"]
    assert [place["host"] for place in places] == ["node0", "node0", "node1", "node2"]
    cores = available_cores()
    wanted = {
        "RANK": ["0", "1", "2", "3"],
        "WORLD_SIZE": ["4"] * 4,
        "LOCAL_RANK": ["0", "1", "0", "0"],
        "LOCAL_WORLD_SIZE": ["2", "2", "1", "1"],
        "NODE_RANK": ["0", "0", "1", "2"],
        "NNODES": ["3"] * 4,
        "MASTER_ADDR": addresses[:1] * 4,
        "ZSPMD_NODE_ADDR": [addresses[0], *addresses],
        "GLOO_SOCKET_IFNAME": ["eth0"] * 4,
        "NCCL_SOCKET_IFNAME": ["=eth0"] * 4,
        "OMP_NUM_THREADS": [str(max(1, cores // 2))] * 2 + [str(cores)] * 2,
        "HF_HOME": ["/models"] * 4,
        "EXTRA_1": ["1"] * 4,
        "TOKEN": ["hidden", "hidden", None, None],
        "OF_NODE1": [None, None, "1", None],
        **{name: [None] * 4 for name in FOREIGN},
    }
    assert {name: [place["environment"].get(name) for place in places] for name in wanted} == wanted
    assert len({place["environment"]["MASTER_PORT"] for place in places}) == 1
    assert [len(names) for names in directories] == [1, 1, 1]
    assert len({name for names in directories for name in names}) == 3
    assert logs == [["r00000.err", "r00000.out", "r00001.err", "r00001.out"], ["r00002.err", "r00002.out"], ["r00003.err", "r00003.out"]]
    assert cluster.hosts[1].path(f"{LOGS}/r00002.out").read_text() == "rank 2 sets up\n"


def test_an_engine_gives_the_tokens_of_one_node_and_shows_nobody_its_keys(
    cluster: Cluster, ssh_servers: SshServers, tmp_path: Path
) -> None:
    """By an ssh that tells all that it does."""
    verbose = tmp_path / "ssh.log"
    rsh = f"{ssh_servers.command} -v -E {verbose}"
    with NodeLaunch(cluster, rsh, program="support.node_engine", lease_s=15.0, log_dir=LOGS + "2") as launch:
        ready = launch.wait("ready", timeout_s=60.0)
        for name, request in REQUESTS.items():
            launch.order("generate", name, *request)
        got = {name: launch.wait("finished")["token_ids"] for name in REQUESTS}
        launch.order("secrets")
        told = launch.wait("secrets")
        files = [verbose, *(path for host in cluster.hosts for path in host.path(LOGS + "2").iterdir())]
        _check_listeners(cluster, launch, ready, told["endpoints"])
        _check_secrets(cluster, [bytes.fromhex(secret) for secret in told["secrets"]], files)
        launch.order("close")
        launch.finish()
    by_name = {event["request"]: event["token_ids"] for event in launch.told("finished")}
    assert got.keys() == by_name.keys()
    assert launch.told("failed") == []
    assert by_name == generate_here(4, REQUESTS)


@pytest.mark.parametrize("parallel", [{"tp": 2, "pp": 2}, {"pp": 2, "dp": 2}], ids=["stages", "replicas"])
def test_stages_and_replicas_on_several_hosts_give_the_tokens_of_one_node(
    cluster: Cluster, ssh_servers: SshServers, parallel: dict[str, int]
) -> None:
    """The first stage of the one has a node to itself; each stage of the other's second replica is on a node of its own."""
    with NodeLaunch(cluster, ssh_servers.command, program="support.node_engine", lease_s=15.0, parallel=parallel) as launch:
        launch.wait("ready", timeout_s=60.0)
        for name, request in REQUESTS.items():
            launch.order("generate", name, *request)
        for _ in REQUESTS:
            launch.wait("finished")
        launch.order("close")
        launch.finish()
    assert launch.told("failed") == []
    assert {event["request"]: event["token_ids"] for event in launch.told("finished")} == generate_here(1, REQUESTS)


def _check_listeners(cluster: Cluster, launch: NodeLaunch, ready: dict[str, Any], endpoints: list[str]) -> None:
    """Check that the driver has its three sockets, each rank one of gloo's, nobody anything else, and all at their host's address."""
    addresses = [host.address for host in cluster.hosts]
    driver = own_listeners_of(launch.pid)
    assert {f"{address}:{port}" for address, port in driver} == set(endpoints)
    assert len(driver) == 3
    of_hosts: list[set[tuple[str, int]]] = [driver, set(), set()]
    for rank, pid in enumerate(ready["pids"]):
        node_rank = [0, 0, 1, 2][rank]
        of_rank = own_listeners_of(pid)
        assert [address for address, _ in of_rank] == [addresses[node_rank]]
        of_hosts[node_rank] |= of_rank
    for index, host in enumerate(cluster.hosts):
        assert all(own_listeners_of(pid) == set() for name in (GUARD, AGENT) for pid in named(host, name))
        assert cluster.listeners(index) == of_hosts[index] | {(host.address, PORT)}
    assert ready["master"][0] == addresses[0]
    assert tuple(ready["master"]) not in cluster.listeners(0)


def _check_secrets(cluster: Cluster, secrets: list[bytes], files: list[Path]) -> None:
    """Check that no key is anywhere, by a search that finds what is there."""
    assert len(secrets) == 6  # of the driver and four ranks, and the token
    assert find([b"zspmd.runtime.launch.guard", b"XDG_RUNTIME_DIR", b"root-"], cluster, files) == {"cmdline", "environ", "files", "run"}
    assert find([form for secret in secrets for form in forms_of(secret)], cluster, files) == set()
