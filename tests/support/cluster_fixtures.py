"""Fixtures with hosts, shared by the tests of a module; what a test leaves in them it is blamed for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from support.cluster import Cluster
from support.cluster_host import NoClusterError
from support.sshd import SshServers
from support.sshd_files import NoSshdError, find_sshd


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[Cluster]:
    """Three hosts, as ``cluster`` hands them out."""
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(Cluster(3))
        except NoClusterError as error:
            pytest.skip(str(error))
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Hand out three hosts; at the end nothing of a launch may be left there, links are healed, and all that runs is killed."""
    try:
        yield shared_cluster
        shared_cluster.check_nothing_left()
    finally:
        shared_cluster.reset()


@pytest.fixture
def needs_sshd() -> None:
    """Skip where there is no ssh server and none can be had."""
    try:
        find_sshd()
    except NoSshdError as error:
        pytest.skip(str(error))


@pytest.fixture
def ssh_servers(cluster: Cluster, needs_sshd: None) -> Iterator[SshServers]:
    """Hand out ssh servers on the hosts of ``cluster``, which let this user in."""
    with SshServers(cluster) as servers:
        yield servers


@pytest.fixture
def rsh(request: pytest.FixtureRequest, cluster: Cluster) -> str:
    """Hand out the command by which a driver reaches hosts: real ssh where the test's parameter for this fixture is "ssh"."""
    if getattr(request, "param", "rsh") == "rsh":
        return cluster.rsh()
    servers: SshServers = request.getfixturevalue("ssh_servers")
    return servers.command
