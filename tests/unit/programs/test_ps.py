"""``zspmd-run ps``: the live launches of this user, as a table and as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.programs import run_program
from support.records import SomeProcesses, some_plan

from zspmd.runtime.launch.launch_record import LaunchRecord
from zspmd.runtime.launch.run_directory import RunDirectory
from zspmd.runtime.programs import ps
from zspmd.runtime.programs.ps import describe_age


@pytest.fixture
def directory() -> Iterator[RunDirectory]:
    held = RunDirectory.create("one")
    yield held
    held.remove()


def record(**changes: object) -> LaunchRecord:
    made = LaunchRecord.of_this_process(some_plan("one", "node0", "node1"), [SomeProcesses({0: 7}), SomeProcesses()], is_script=True)
    return replace(made, argv=("/usr/bin/zspmd-run", "-n", "2", "train it.py"), **changes)  # type: ignore[arg-type]  # fields of several types


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_program(ps, *arguments) == 0
    return capsys.readouterr().out


def test_without_a_launch_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys) == "no launch lives\n"
    assert json.loads(shown(capsys, "--json")) == []


def test_a_launch_is_a_line(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    record().write(directory.path)
    heading, line = shown(capsys).splitlines()
    assert heading.split() == ["LAUNCH", "KIND", "PID", "UP", "RANKS", "NODES", "COMMAND"]
    assert re.fullmatch(r"one +script +\d+ +0:\d\d +2 +node0,node1 +zspmd-run -n 2 'train it\.py'", line)


def test_a_launch_whose_driver_was_killed_is_ending(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    record(pid_start=1).write(directory.path)
    assert "script, ending: its driver is gone" in shown(capsys)


def test_a_launch_without_a_record_is_a_line_too(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"one +\? .* it has no record yet$", shown(capsys), re.MULTILINE)
    (told,) = json.loads(shown(capsys, "--json"))
    assert (told["launch_id"], told["trouble"]) == ("one", "it has no record yet")


def test_many_nodes_and_long_commands_are_cut(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    hosts = [f"n{number}" for number in range(6)]
    made = LaunchRecord.of_this_process(some_plan("one", *hosts), [SomeProcesses()] * 6)
    replace(made, argv=("zspmd-run", "x" * 200)).write(directory.path)
    line = shown(capsys).splitlines()[1]
    assert " n0,n1,n2,n3,... (6) " in line
    assert line.endswith("xxx...")
    assert len(line) < 200


def test_as_json_it_has_everything(directory: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    record().write(directory.path)
    (told,) = json.loads(shown(capsys, "--json"))
    assert (told["launch_id"], told["kind"], told["has_driver"], told["run_directory"]) == ("one", "script", True, str(directory.path))
    assert [node["ranks"][0]["pid"] for node in told["nodes"]] == [7, 0]


@pytest.mark.parametrize(("age_s", "text"), [(0.4, "0:00"), (192, "3:12"), (3605, "1:00:05"), (2 * 86400 + 10_800, "2d 3:00:00")])
def test_ages(age_s: float, text: str) -> None:
    assert describe_age(age_s) == text
