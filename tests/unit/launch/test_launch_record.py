"""What a live launch leaves in its run directory, and how it is found and named."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.records import SomeProcesses, some_plan

from zspmd.config import NodesConfig
from zspmd.errors import ConfigError
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.launch.launch_record import RECORD_NAME, LaunchRecord, process_start
from zspmd.runtime.launch.live_launches import choose_name, find_launch, is_held, live_launches
from zspmd.runtime.launch.run_directory import RunDirectory

HOSTS = (Host("node0"), Host("node1", user="lee", port=2222), Host("spare"))


def record(launch_id: str = "one") -> LaunchRecord:
    return LaunchRecord.of_this_process(
        some_plan(launch_id, "node0", "node1"),
        [SomeProcesses({0: 7}, 5, 6), SomeProcesses({}, None, 9)],
        is_script=True,
        log_dir="/logs",
        hosts=HOSTS,
        config=NodesConfig(rsh="ssh -v"),
    )


@pytest.fixture
def directory() -> Iterator[RunDirectory]:
    held = RunDirectory.create("one")
    yield held
    held.remove()


def test_a_record_is_read_as_it_was_written_and_by_nobody_else(directory: RunDirectory) -> None:
    written = record()
    assert written.write(directory.path) is None
    assert LaunchRecord.read(directory.path) == written
    assert stat.S_IMODE((directory.path / RECORD_NAME).stat().st_mode) == 0o600
    assert sorted(os.listdir(directory.path)) == [RECORD_NAME, "lock"]


def test_a_record_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "launch.json.new").mkdir()
    trouble = record().write(tmp_path)
    assert trouble is not None
    assert trouble.startswith("zspmd-run ps does not know this launch: ")


def test_a_launch_whose_directory_is_gone_has_ended_and_needs_no_record(tmp_path: Path) -> None:
    assert record().write(tmp_path / "absent") is None


def test_it_says_who_is_where_and_how_to_get_there() -> None:
    told = record()
    assert (told.kind, told.pid, told.world_size, told.cwd) == ("script", os.getpid(), 2, os.getcwd())
    assert told.pid_start == process_start(os.getpid())
    assert abs(told.started_at - time.time()) < 60
    here, there = told.nodes
    assert (here.rsh, here.agent_pid, here.guard_pid, here.ranks[0].pid) == ((), 5, 6, 7)
    assert (there.target, there.agent_pid, there.guard_pid, there.ranks[0].pid) == ("lee@node1", 0, 9, 0)
    assert (there.rsh[:2], there.rsh[-1]) == (("ssh", "-v"), "lee@node1")
    assert "2222" in there.rsh
    assert (there.ranks[0].out, there.ranks[0].err) == ("/logs/r00001.out", "/logs/r00001.err")


def test_a_program_of_somebody_s_own_is_told_from_zspmd_run() -> None:
    plain = LaunchRecord.of_this_process(some_plan("one"), [SomeProcesses()])
    assert plain.kind in ("embedded", "program")
    assert (plain.nodes[0].ranks[0].out, plain.log_dir) == ("", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"nodes": 3}',
        json.dumps({"nodes": []}),
        "[" * 100_000,
    ],
    ids=["empty", "cut off", "list", "nodes of another type", "fields missing", "deep"],
)
def test_a_record_that_cannot_be_read(directory: RunDirectory, text: str) -> None:
    (directory.path / RECORD_NAME).write_text(text)
    with pytest.raises(ConfigError, match="cannot be read as zspmd"):
        LaunchRecord.read(directory.path)
    (launch,) = live_launches()
    assert launch.record is None
    assert "cannot be read" in launch.trouble


@pytest.mark.parametrize(("name", "value"), [("pid", "7"), ("pid", -1), ("kind", "other"), ("launch_id", 3), ("argv", [1])])
def test_fields_of_another_type_are_refused(directory: RunDirectory, name: str, value: object) -> None:
    record().write(directory.path)
    path = directory.path / RECORD_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ConfigError, match="ValueError"):
        LaunchRecord.read(directory.path)


def test_a_launch_lives_as_long_as_its_lock_is_held(directory: RunDirectory) -> None:
    record().write(directory.path)
    (launch,) = live_launches()
    assert (launch.name, launch.is_live, launch.has_driver) == ("one", True, True)
    assert launch.age_s is not None
    assert 0 <= launch.age_s < 60
    directory.remove()
    assert not launch.is_live
    assert live_launches() == []


def test_what_dead_launches_have_left_is_no_launch(directory: RunDirectory) -> None:
    dead = directory.path.parent / "dead"
    dead.mkdir()
    (dead / "lock").touch()
    assert not is_held(dead)
    assert [launch.name for launch in live_launches()] == ["one"]
    (dead / "lock").unlink()
    dead.rmdir()


def test_a_launch_that_is_just_starting_has_no_record_yet(directory: RunDirectory) -> None:
    (launch,) = live_launches()
    assert (launch.name, launch.record, launch.trouble, launch.has_driver) == ("one", None, "it has no record yet", False)


def test_the_directory_of_another_machine_s_launch_is_none_of_this_one(directory: RunDirectory) -> None:
    other = RunDirectory.create("two", 3)
    assert [launch.name for launch in live_launches()] == ["one"]
    other.remove()


def test_a_launch_is_named_by_its_id_or_its_beginning(directory: RunDirectory) -> None:
    assert find_launch("on", live_launches()).name == "one"
    with pytest.raises(ConfigError, match="there is no live launch 'oen'; there is one; did you mean 'one'"):
        find_launch("oen", live_launches())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lee", "'lee' begins the ids of 2 launches: lee-1, lee-2; write more of it"),
        ("", "there is no launch ''; there are 3: lee-1, lee-2, leo"),
        ("bob", "there is no launch 'bob'; there are 3"),
    ],
    ids=["ambiguous", "empty", "unknown"],
)
def test_a_name_that_stands_for_none_or_several(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        choose_name(name, ["lee-1", "lee-2", "leo"], "launch")
    assert choose_name("leo", ["leo", "leo-2"], "launch") == "leo"


def test_a_process_is_known_by_its_start(tmp_path: Path) -> None:
    assert process_start(1 << 22) is None
    assert (process_start(os.getpid()) or 0) > 0
