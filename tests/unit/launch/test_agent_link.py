from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from zspmd.config import NodesConfig
from zspmd.errors import ConfigError
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.launch.nodes.agent_link import RshLink, agent_command, is_refused_for_load, rsh_argv

AGENT = "-u -m zspmd.runtime.launch.guard --stdio"


def test_ssh_gets_no_terminal_asks_nothing_and_forwards_nothing() -> None:
    argv = rsh_argv(Host("node1", user="lee", port=2222), NodesConfig(ssh_options=("-F", "my config")))
    assert argv[0] == "ssh"
    assert {"-T", "-x", "-a", "BatchMode=yes", "ClearAllForwardings=yes"} <= set(argv)
    assert "-tt" not in argv
    assert argv[argv.index("-p") + 1] == "2222"
    assert argv[-4:-1] == ("-F", "my config", "lee@node1")


def test_the_port_of_the_settings_is_for_hosts_without_their_own() -> None:
    config = NodesConfig(ssh_port=2200)
    assert rsh_argv(Host("a"), config)[rsh_argv(Host("a"), config).index("-p") + 1] == "2200"
    assert "-p" not in rsh_argv(Host("a"), NodesConfig())


def test_another_command_gets_host_and_line_and_no_options() -> None:
    argv = rsh_argv(Host("node1", user="lee"), NodesConfig(rsh="kubectl exec -i 'a b' --"))
    assert argv[:-1] == ("kubectl", "exec", "-i", "a b", "--", "lee@node1")
    assert AGENT in argv[-1]


def test_another_command_has_no_port() -> None:
    with pytest.raises(ConfigError, match="port 22 of node1 is ssh's"):
        rsh_argv(Host("node1", port=22), NodesConfig(rsh="docker exec -i"))


@pytest.mark.parametrize(
    ("host", "config", "python"),
    [
        (Host("a"), NodesConfig(), sys.executable),
        (Host("a"), NodesConfig(python="/opt/x/python"), "/opt/x/python"),
        (Host("a", python="/own/python"), NodesConfig(python="/opt/x/python"), "/own/python"),
    ],
    ids=["the driver's", "of the settings", "of the host"],
)
def test_the_interpreter_is_the_nearest_one_named(host: Host, config: NodesConfig, python: str) -> None:
    assert agent_command(host, config) == f"exec sh -c 'cd / && exec {python} {AGENT}'"


@pytest.mark.parametrize(
    ("way", "is_load"),
    [
        ("ssh a exited with code 255: kex_exchange_identification: Connection closed by remote host", True),
        ("ssh a exited with code 255: Connection reset by 10.0.0.1 port 22", True),
        ("ssh a exited with code 255: Permission denied (publickey).", False),
        ("ssh a exited with code 127", False),
    ],
)
def test_who_comes_too_many_at_a_time_is_told_from_who_may_not_come(way: str, is_load: bool) -> None:
    assert is_refused_for_load(way) is is_load


def program(directory: Path, text: str) -> str:
    path = directory / "rsh"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


async def test_a_link_says_how_it_ended_and_what_it_said_last(tmp_path: Path) -> None:
    link = RshLink(Host("node1"), NodesConfig(rsh=program(tmp_path, "echo one >&2; printf two >&2; exit 3")))
    fds = link.open()
    assert await link.wait_ended(10) == "rsh node1 exited with code 3: two"
    assert link.tail == ["one", "two"]
    for fd in fds:
        os.close(fd)


async def test_a_link_that_is_killed_ends_with_all_that_it_started(tmp_path: Path) -> None:
    link = RshLink(Host("node1"), NodesConfig(rsh=program(tmp_path, "sleep 1000 & cat")))
    fds = link.open()
    assert await link.wait_ended(0.01) is None
    link.kill()
    link.kill()
    assert (await link.wait_ended(10) or "").startswith("rsh node1 was ended by SIGKILL")
    for fd in fds:
        os.close(fd)


async def test_a_command_that_is_not_installed_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'/no/such/rsh' is not installed.*--rsh"):
        RshLink(Host("node1"), NodesConfig(rsh="/no/such/rsh")).open()
