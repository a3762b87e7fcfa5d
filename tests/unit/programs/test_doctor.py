"""``zspmd-run doctor`` with hosts: whom it asks, what it prints, how it exits. What it finds out is in ``test_examination``."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from zspmd.config import NodesConfig, ParallelConfig
from zspmd.errors import ConfigError, HostfileError
from zspmd.runtime.launch.checks import examination
from zspmd.runtime.launch.checks.check_records import FAIL, OK, WARN, Check
from zspmd.runtime.launch.command.options import LaunchOptions
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.programs import doctor

FINE = Check("agent", OK, "by ssh, after 0.40 s")
BROKEN = Check("tcp", FAIL, "n2 at 10.0.0.2 port 4711: no answer within 5 s", "open it")
ODD = Check("login", WARN, "prints a line", "let it not")


class Examined:
    """Answers in place of ``examine_nodes``, and keeps what it was asked."""

    def __init__(self, checks: dict[str, list[Check]]) -> None:
        self.checks = checks
        self.asked: list[tuple[list[str], NodesConfig, str, str]] = []

    async def __call__(self, hosts: Sequence[Host], config: NodesConfig, *, cwd: str, script: str) -> list[tuple[str, list[Check]]]:
        self.asked.append(([host.target for host in hosts], config, cwd, script))
        return [(host.target, self.checks.get(host.target, [FINE])) for host in hosts]


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> Examined:
    async def here() -> Check:
        return Check("launch", OK, "two ranks ran")

    examined = Examined({"n1": [FINE, ODD], "n2": [FINE, BROKEN, BROKEN]})
    monkeypatch.setattr(examination, "examine_nodes", examined)
    monkeypatch.setattr(doctor, "MACHINE_CHECKS", (lambda: Check("python", OK, "3.11.7"),))
    monkeypatch.setattr(doctor, "check_torch", here)
    monkeypatch.setattr(doctor, "check_launch", here)
    return examined


def run(*argv: str, hosts: tuple[Host, ...] | None = None, nodes: NodesConfig | None = None) -> int:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    options = LaunchOptions(ParallelConfig(), "lee-1", (), None, False, hosts=hosts, nodes=nodes or NodesConfig())
    return asyncio.run(_ended(parser.parse_args(argv), options))


async def _ended(arguments: argparse.Namespace, options: LaunchOptions) -> int:
    return int(await doctor.run(arguments, options))


HERE = "ok    python         3.11.7\nok    launch         two ranks ran\nok    launch         two ranks ran\n"


def test_one_machine_has_no_heading(examined: Examined, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    assert capsys.readouterr().out == HERE
    assert not examined.asked


def test_hosts_have_headings_and_a_last_line_for_all(examined: Examined, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--host", "n1,n2") == 1
    assert capsys.readouterr().out == (
        f"this machine:\n{HERE}"
        "n1:\n"
        "ok    agent          by ssh, after 0.40 s\n"
        "warn  login          prints a line\n      -> let it not\n"
        "n2:\n"
        "ok    agent          by ssh, after 0.40 s\n"
        "FAIL  tcp            n2 at 10.0.0.2 port 4711: no answer within 5 s\n      -> open it\n"
        "FAIL  tcp            n2 at 10.0.0.2 port 4711: no answer within 5 s\n      -> open it\n"
        "failed at n2: tcp; fine: this machine, n1\n"
    )


def test_hosts_that_are_fine_exit_with_0(examined: Examined, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--host", "n1,n3") == 0
    assert capsys.readouterr().out.endswith("\nfine: this machine, n1, n3\n")


def test_json_names_the_host_of_each_check(examined: Examined, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--host", "n2", "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert [(entry["host"], entry["name"]) for entry in told] == [
        *(("this machine", name) for name in ("python", "launch", "launch")),
        *(("n2", name) for name in ("agent", "tcp", "tcp")),
    ]
    assert told[-1] == {"host": "n2", "name": "tcp", "status": "FAIL", "text": BROKEN.text, "advice": "open it"}


def test_the_hosts_of_a_file_and_the_settings_of_the_launch_are_used(examined: Examined, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n1 slots=2\nlee@n3\n\nn4\n")
    nodes = NodesConfig(rsh="rsh", exclude="n1")
    assert run("--hostfile", str(tmp_path / "hosts"), "--script", "train.py", nodes=nodes) == 0
    assert examined.asked == [(["lee@n3", "n4"], nodes, os.getcwd(), "train.py")]


def test_hosts_before_the_program_s_name_are_taken_as_they_were_chosen(examined: Examined) -> None:
    assert run(hosts=(Host("n3"), Host("n1")), nodes=NodesConfig(exclude="n9")) == 0
    assert [hosts for hosts, *_ in examined.asked] == [["n3", "n1"]]


@pytest.mark.parametrize(
    ("argv", "error", "words"),
    [
        (["--host", "a", "--hostfile", "b"], ConfigError, "--hostfile and --host are both given; name the hosts by one of them"),
        (["--hostfile", "/no/such/file"], HostfileError, "/no/such/file"),
        (["--host", "a:b:c"], ConfigError, "a:b:c"),
    ],
    ids=["both", "no file", "no host"],
)
def test_wrong_input_is_told_before_anything_is_checked(
    examined: Examined, capsys: pytest.CaptureFixture[str], argv: list[str], error: type[ConfigError], words: str
) -> None:
    with pytest.raises(error, match=words):
        run(*argv)
    assert capsys.readouterr().out == ""


def test_the_plan_names_the_hosts(examined: Examined) -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    options = LaunchOptions(ParallelConfig(), "lee-1", (), None, False)
    assert doctor.prepare(parser.parse_args([]), options) == "checks of this machine"
    assert doctor.prepare(parser.parse_args(["--host", "lee@n1,n2"]), options) == "checks of this machine and lee@n1, n2"
