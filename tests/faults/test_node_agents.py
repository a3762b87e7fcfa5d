"""What surrounds a launch over several nodes and is not as it should be: logins, networks, disks, slow links, hosts that do not answer."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TypeVar

import pytest
from support.cluster import Cluster
from support.node_launch import NodeLaunch
from support.script_nodes import ScriptNodes, finish, prefixed
from support.script_nodes import script_nodes as script_nodes

from zspmd.config import NodesConfig
from zspmd.errors import LaunchError
from zspmd.runtime.launch.agent_protocol import AgentGone, AgentWarning, RankExited, RankLog, RankStart, Start
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.launch.nodes.agent_link import RshLink
from zspmd.runtime.launch.supervisor import AgentLost, Event, NodeSupervisor

E = TypeVar("E")
DEADLINE_S = 30.0
PROMPT_S = 3.0
HELLO = ("--no-python", "sh", "-c", "echo hello")


# --- logins ---


@pytest.mark.parametrize("banner", ["no newline", "\x1b]0;a title\x07", "a line\nand more"], ids=["text", "title", "lines"])
def test_a_login_may_end_what_it_prints_without_a_newline(script_nodes: ScriptNodes, banner: str) -> None:
    ended = script_nodes.run(*HELLO, rsh=script_nodes.cluster.rsh(banner=banner))
    assert (ended.code, sorted(ended.out.split())[-4:]) == (0, ["hello"] * 4)


def test_a_host_that_does_not_answer_keeps_nobody_from_ending_the_launch(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin(*HELLO, rsh=script_nodes.cluster.rsh(delay_s=600.0))
    script_nodes.wait_agents(1)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    ended = finish(process, since=asked)
    assert ended.code == 130
    assert ended.elapsed_s < PROMPT_S
    assert "Traceback" not in ended.errors


def test_a_host_that_cannot_be_used_is_told_of_without_a_traceback(script_nodes: ScriptNodes) -> None:
    ended = script_nodes.run(*HELLO, rsh="false")
    assert ended.code == 120
    assert "2 of 3 hosts cannot be used as they are" in ended.errors
    assert "Traceback" not in ended.errors


# --- networks ---


def use_localhost(cluster: Cluster) -> str:
    return "localhost"


def use_loopback_name(cluster: Cluster) -> str:
    hosts_file = cluster.hosts[0].hosts_file
    hosts_file.write_text(hosts_file.read_text().replace(f"{cluster.hosts[0].address} node0", "127.0.1.1 node0"))
    return "node0"


def use_other_login(cluster: Cluster) -> str:
    return "node0"


@pytest.mark.parametrize("name_of", [use_localhost, use_loopback_name, use_other_login], ids=["localhost", "127.0.1.1", "login elsewhere"])
def test_the_drivers_address_is_the_one_by_which_it_reaches_the_others(cluster: Cluster, name_of: object) -> None:
    assert callable(name_of)
    cluster.add_interface(0, "other", "192.168.7.1/24")
    hosts = [f"{name_of(cluster)} slots=1", "node1 slots=1"]
    env = {"SSH_CONNECTION": "192.168.7.9 50000 192.168.7.1 22"}
    with NodeLaunch(cluster, cluster.rsh(), hosts=hosts, slots=(1, 1), env=env) as launch:
        launch.wait("ready")
        launch.order("close")
        launch.finish()


def test_an_address_that_could_be_bound_is_not_taken_for_ones_own(cluster: Cluster) -> None:
    setting = "/proc/sys/net/ipv4/ip_nonlocal_bind"
    subprocess.run([*cluster.hosts[0].entering, "sh", "-c", f"echo 1 > {setting}"], check=True)
    try:
        with NodeLaunch(cluster, cluster.rsh(), hosts=["node1 slots=1", "node2 slots=1"], slots=(1, 1)) as launch:
            launch.wait("ready")
            assert [len(cluster.processes(index)) > 2 for index in (1, 2)] == [True, True]
            launch.order("close")
            launch.finish()
    finally:
        subprocess.run([*cluster.hosts[0].entering, "sh", "-c", f"echo 0 > {setting}"], check=True)


# --- disks ---


def test_a_node_that_can_keep_no_log_files_takes_part_without(script_nodes: ScriptNodes, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    host = script_nodes.hosts[1]
    subprocess.run([*host.entering, "mount", "-t", "tmpfs", "-o", "ro", "none", str(logs)], check=True)
    try:
        ended = script_nodes.run("--log-dir", str(logs), *HELLO)
    finally:
        subprocess.run([*host.entering, "umount", str(logs)], check=True)
    assert ended.code == 0, ended.errors
    assert ended.errors.count("no log files are kept on node1: ") == 1
    assert prefixed(ended.out, 2) == ["hello"]
    assert sorted(path.name for path in logs.glob("*.out")) == ["r00000.out", "r00001.out", "r00003.out"]


# --- agents behind a command of the test's own ---


class Remote:
    """A supervisor of a node that is reached by a program, with one rank that runs ``code``."""

    def __init__(self, directory: Path, program: str) -> None:
        path = directory / "rsh"
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o755)
        self.events: list[Event] = []
        self._ended = asyncio.Event()
        self.supervisor = NodeSupervisor(self._take, RshLink(Host("node1"), NodesConfig(rsh=str(path))), 15.0)

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]

    async def start(self, **order: object) -> None:
        environment = {**os.environ, "RANK": "0"}
        await self.supervisor.start(Start((RankStart(0, environment),), has_own_environment=True, **order), None, DEADLINE_S)  # type: ignore[arg-type]

    async def wait_ended(self) -> None:
        await asyncio.wait_for(self._ended.wait(), DEADLINE_S)

    def _take(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, (AgentGone, AgentLost)):
            self._ended.set()


async def test_an_agent_that_never_was_is_told_of_once(tmp_path: Path) -> None:
    remote = Remote(tmp_path, "echo no way >&2; exit 255")
    remote.supervisor.open()
    with pytest.raises(LaunchError, match="rsh node1 exited with code 255: no way"):
        await remote.supervisor.wait_attached(DEADLINE_S)
    await remote.supervisor.stop(0.0, 0.0)
    assert remote.events == []


async def test_an_agent_that_is_waited_for_is_given_up_at_once(tmp_path: Path) -> None:
    remote = Remote(tmp_path, "exec sleep 600")
    remote.supervisor.open()
    started = time.monotonic()
    await remote.supervisor.stop(0.0, 0.0)
    assert time.monotonic() - started < PROMPT_S


THROTTLE = "import os, time\nwhile data := os.read(0, 65536):\n    while data: data = data[os.write(1, data):]\n    time.sleep(0.03)\n"
NUM_LINES = 80_000
PRINTS = f"import sys; sys.exit([print('x' * 199) for _ in range({NUM_LINES})] and 7)"


async def test_what_a_slow_link_has_yet_to_carry_is_waited_for_and_what_it_cannot_is_counted(tmp_path: Path) -> None:
    """Eight megabytes at two a second; an agent that would end before they have arrived would take the rank's exit code with it."""
    (tmp_path / "throttle.py").write_text(THROTTLE)
    remote = Remote(tmp_path, f'sh -c "$2" | {sys.executable} -I -S {tmp_path}/throttle.py')
    remote.supervisor.open()
    await remote.supervisor.wait_attached(DEADLINE_S)
    await remote.start(start_method="spawn", argv=(sys.executable, "-I", "-S", "-c", PRINTS))
    await remote.wait_ended()
    assert [ended.exit_code for ended in remote.of(RankExited)] == [7]
    warnings = [warning.reason for warning in remote.of(AgentWarning)]
    num_dropped = sum(int(reason.split()[0]) for reason in warnings)
    assert sum(len(log.lines) for log in remote.of(RankLog)) + num_dropped == NUM_LINES
    assert 0 < len(warnings) <= 4
    assert "files are complete" not in warnings[0]
    assert remote.of(AgentLost) == []
    await remote.supervisor.stop(0.0, 0.0)


async def test_what_fails_on_a_node_is_told_with_its_name_and_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "broken_module.py").write_text("import os\nprint('the driver is too old', flush=True)\nos.abort()\n")
    remote = Remote(tmp_path, 'exec sh -c "$2"')
    remote.supervisor.open()
    await remote.supervisor.wait_attached(DEADLINE_S)
    with pytest.raises(LaunchError, match=r"^rsh node1: .* was ended by SIGABRT(.|\n)*the driver is too old"):
        await remote.start(start_method="fork", preload=("broken_module",), sys_path=(str(tmp_path), *sys.path))
