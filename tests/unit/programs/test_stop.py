"""``zspmd-run stop``: a launcher is asked, an embedded launch loses its agents, and the lock tells when all is over."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.polling import block_until
from support.programs import run_program
from support.records import SomeProcesses, some_plan

from zspmd.runtime.launch import stopping
from zspmd.runtime.launch.launch_record import LaunchRecord
from zspmd.runtime.launch.live_launches import live_launches
from zspmd.runtime.launch.run_directory import RunDirectory
from zspmd.runtime.programs import stop

TESTS = Path(__file__).parents[2]


@contextlib.contextmanager
def held(kind: str, how: str) -> Iterator[subprocess.Popen[str]]:
    """A process with a live launch "one"; see ``support/held_launch.py``."""
    command = [sys.executable, str(TESTS / "support" / "held_launch.py"), "one", kind, how]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
            process.wait()
            RunDirectory.create("one").remove()  # what a killed one has left


def told_by_stop(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert run_program(stop, *arguments) == code
    told = capsys.readouterr()
    return told.err if code else told.out


@pytest.mark.parametrize("kind", ["script", "program"])
@pytest.mark.parametrize("options", [[], ["--now"]], ids=["gently", "now"])
def test_a_launcher_is_asked_to_end(capsys: pytest.CaptureFixture[str], kind: str, options: list[str]) -> None:
    with held(kind, "ends") as process:
        assert re.fullmatch(r"launch one has ended after \d\.\d s\n", told_by_stop(capsys, "on", *options))
        assert process.wait(10) == 0
    assert live_launches() == []


def test_a_launch_that_does_not_end_in_time_is_told_and_left(capsys: pytest.CaptureFixture[str]) -> None:
    with held("script", "stays") as process:
        begun = time.monotonic()
        assert "launch one is still there after 0.3 s; --now ends it by force" in told_by_stop(capsys, "one", "--wait", "0.3", code=1)
        assert time.monotonic() - begun < 5
        assert process.poll() is None


def test_by_force_even_a_launcher_that_hangs_ends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_KILL_AFTER_S", 0.2)
    with held("script", "stays") as process:
        assert "launch one has ended" in told_by_stop(capsys, "one", "--now")
        assert process.wait(10) == -9


@pytest.mark.parametrize("options", [[], ["--now"]], ids=["gently", "now"])
def test_a_program_of_ones_own_gets_no_signal_and_its_agents_do(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with held("embedded", "guard") as process:
        assert "launch one has ended" in told_by_stop(capsys, "one", *options)
        told, _ = process.communicate(timeout=10)
    assert (process.returncode, told) == (0, f"the guard ended with {-3 if options else -15}\n")


def test_agents_of_other_nodes_are_told_over_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    directory = RunDirectory.create("one")
    target = subprocess.Popen(["sleep", "600"])
    try:
        made = LaunchRecord.of_this_process(some_plan("one", "node0", "node1"), [SomeProcesses(), SomeProcesses({}, None, target.pid)])
        rsh = (sys.executable, "-c", "import subprocess, sys; sys.exit(subprocess.call(['sh', '-c', sys.argv[2]]))", "node1")
        there = replace(made.nodes[1], is_local=False, rsh=rsh)
        replace(made, kind="embedded", nodes=(made.nodes[0], there)).write(directory.path)
        assert "is still there after 0 s" in told_by_stop(capsys, "one", "--wait", "0", code=1)  # this process holds on to it
        assert target.wait(10) == -15
        assert "failed with 1; see the lines above" in told_by_stop(capsys, "one", code=120)
    finally:
        target.kill()
        target.wait()
        directory.remove()


def test_no_other_process_is_taken_for_the_driver(capsys: pytest.CaptureFixture[str]) -> None:
    """Its number is this process's now, say; a signal would end the test."""
    directory = RunDirectory.create("one")
    try:
        made = LaunchRecord.of_this_process(some_plan("one"), [SomeProcesses({}, None, os.getpid())], is_script=True)
        replace(made, pid_start=made.pid_start - 1).write(directory.path)
        assert "is still there after 0.1 s" in told_by_stop(capsys, "one", "--wait", "0.1", code=1)
        replace(made, kind="embedded").write(directory.path)
        assert "none of the agents of launch one can be told to end" in told_by_stop(capsys, "one", code=2)
    finally:
        directory.remove()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["two"], "there is no live launch 'two'; there is one"),
        (["one", "--wait", "-1"], "--wait is -1.0 s"),
        (["one"], "it has no record yet"),
    ],
    ids=["unknown", "wait", "no record"],
)
def test_what_cannot_be_stopped(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    directory = RunDirectory.create("one")
    try:
        assert words in told_by_stop(capsys, *arguments, code=2)
    finally:
        directory.remove()


def test_a_launch_that_was_killed_is_no_launch(capsys: pytest.CaptureFixture[str]) -> None:
    with held("script", "ends") as process:
        process.kill()
        block_until(lambda: live_launches() == [], 10)
        assert "there is no live launch 'one'; there is none" in told_by_stop(capsys, "one", code=2)
