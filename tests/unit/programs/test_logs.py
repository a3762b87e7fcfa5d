"""``zspmd-run logs``: the files of a live launch and of one that has ended, here and on another node."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.polling import block_until
from support.programs import run_program
from support.records import SomeProcesses, some_plan

from zspmd.config import NodesConfig
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.launch.launch_record import LaunchRecord
from zspmd.runtime.launch.run_directory import RunDirectory
from zspmd.runtime.programs import logs


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The log files of a launch of two ranks that has ended."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    directory = tmp_path / "zspmd" / "lee-1"
    directory.mkdir(parents=True)
    for rank in range(2):
        (directory / f"r0000{rank}.out").write_bytes(b"out %d\nmore\xff" % rank)
        (directory / f"r0000{rank}.err").write_bytes(b"err %d\n" % rank)
    (directory / "launcher.log").write_text("own\n")
    (tmp_path / "zspmd" / "latest").symlink_to("lee-1")
    return directory


@pytest.fixture
def held() -> Iterator[RunDirectory]:
    directory = RunDirectory.create("live")
    yield directory
    directory.remove()


def shown(capfdbinary: pytest.CaptureFixture[bytes], *arguments: str, code: int = 0) -> tuple[bytes, bytes]:
    assert run_program(logs, *arguments) == code
    return capfdbinary.readouterr()


def test_one_stream_of_one_rank_is_copied_byte_for_byte(state: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert shown(capfdbinary, "lee-1", "--rank", "1", "--stream", "out") == (b"out 1\nmore\xff", b"")


@pytest.mark.parametrize("name", ["lee-1", "lee", "latest"])
def test_all_ranks_have_prefixes(state: Path, capfdbinary: pytest.CaptureFixture[bytes], name: str) -> None:
    lines = [b"[rank 0 out] out 0", b"[rank 0 out] more\xff", b"[rank 0 err] err 0"]
    lines += [line.replace(b" 0", b" 1") for line in lines]
    assert shown(capfdbinary, name)[0] == b"\n".join(lines) + b"\n"


def test_a_prefix_says_no_more_than_is_needed(state: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert shown(capfdbinary, "lee-1", "--stream", "err")[0] == b"[rank 0] err 0\n[rank 1] err 1\n"
    assert shown(capfdbinary, "lee-1", "--rank", "0")[0] == b"[out] out 0\n[out] more\xff\n[err] err 0\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bob"], b"there is no launch with log files 'bob'; there is lee-1"),
        (["lee-1", "--rank", "2"], b"--rank is 2; the launch has ranks 0-1"),
        (["../lee-1"], b"there is no launch with log files '../lee-1'"),
    ],
    ids=["unknown", "no such rank", "a path"],
)
def test_what_is_not_there(state: Path, capfdbinary: pytest.CaptureFixture[bytes], arguments: list[str], words: bytes) -> None:
    assert words in shown(capfdbinary, *arguments, code=2)[1]


def test_a_launch_that_never_started_a_rank(state: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (state.parent / "empty").mkdir()
    assert b"has no log files: no rank was started" in shown(capfdbinary, "empty", code=2)[1]


def test_a_live_launch_without_log_files_says_so(state: Path, held: RunDirectory, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    LaunchRecord.of_this_process(some_plan("live"), [SomeProcesses()]).write(held.path)
    assert b"launch live keeps no log files" in shown(capfdbinary, "live", code=2)[1]


def test_the_files_of_another_node_are_read_there(tmp_path: Path, held: RunDirectory, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The way to it is a command that gets the host and a line for the shell there."""
    (tmp_path / "rsh").write_text('#!/bin/sh\ntest "$1" = lee@node1 || exit 9\nexec sh -c "$2"\n')
    (tmp_path / "rsh").chmod(0o755)
    logs = tmp_path / "it's there"
    logs.mkdir()
    (logs / "r00001.out").write_text("over there\n")
    made = LaunchRecord.of_this_process(
        some_plan("live", "node0", "node1"),
        [SomeProcesses(), SomeProcesses()],
        log_dir=str(logs),
        hosts=[Host("node0"), Host("node1", user="lee")],
        config=NodesConfig(rsh=str(tmp_path / "rsh")),
    )
    made.write(held.path)
    assert shown(capfdbinary, "live", "--rank", "1", "--stream", "out") == (b"over there\n", b"")
    assert shown(capfdbinary, "live", "--stream", "out")[0] == b"[rank 1] over there\n"
    _, errors = shown(capfdbinary, "live", "--rank", "1", "--stream", "err", code=120)
    assert b"r00001.err" in errors
    assert b"node1: tail exited with code 1; its lines above say why" in errors
    node = replace(made.nodes[1], rsh=())
    replace(made, nodes=(made.nodes[0], node)).write(held.path)
    assert b"node node1 has called in by itself" in shown(capfdbinary, "live", code=2)[1]


@pytest.mark.parametrize("options", [["--rank", "0", "--stream", "out"], []], ids=["one file", "all files"])
def test_following_ends_with_the_launch(tmp_path: Path, held: RunDirectory, options: list[str]) -> None:
    LaunchRecord.of_this_process(some_plan("live"), [SomeProcesses()], log_dir=str(tmp_path)).write(held.path)
    command = [sys.executable, "-m", "zspmd.runtime.launch.cli", "logs", "live", "-f", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        prefix = "" if options else "[out] "
        with open(tmp_path / "r00000.out", "w") as file:  # made after the reader has begun to wait for it, or before: both are right
            for number in range(3):
                file.write(f"line {number}\n")
                file.flush()
                assert process.stdout.readline() == f"{prefix}line {number}\n"
            assert process.poll() is None
            file.write("last")
        held.remove()
        assert process.stdout.read().rstrip() == f"{prefix}last"
        block_until(lambda: process.poll() is not None, 10)
    assert process.returncode == 0


def test_the_home_is_not_asked_for_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "absent"))
    assert b"there is no launch with log files 'x'; there is none" in shown(capfdbinary, "x", code=2)[1]
    assert not os.path.exists(tmp_path / "absent")
