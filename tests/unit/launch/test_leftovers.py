"""Which processes doctor takes for left by a launch: those of this user, of a launch, and with no agent above them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zspmd.runtime.launch.checks import leftovers
from zspmd.runtime.launch.checks.leftovers import Leftover, find_leftovers

OWN = os.getpid()


class Processes:
    """A directory that stands for /proc."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, pid: int, parent: int, name: str = "python", *, launch: str = "", state: str = "S", command: str = "python x.py") -> None:
        entry = self.root / str(pid)
        entry.mkdir()
        (entry / "stat").write_text(f"{pid} ({name}) {state} {parent} 0 0")
        (entry / "environ").write_bytes(b"PATH=/bin\0" + (f"ZSPMD_LAUNCH_ID={launch}\0".encode() if launch else b""))
        (entry / "cmdline").write_bytes(command.replace(" ", "\0").encode() + b"\0")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Processes:
    monkeypatch.setattr(leftovers, "_PROC", tmp_path)
    (tmp_path / "sys").mkdir()
    found = Processes(tmp_path)
    found.add(1, 0, "init")
    found.add(OWN, 1, "doctor")
    return found


def test_a_rank_without_an_agent_is_found(processes: Processes) -> None:
    processes.add(700, 1, launch="lee-1")
    assert find_leftovers() == [Leftover(700, "lee-1", "python x.py")]


def test_what_it_has_started_is_found_too(processes: Processes) -> None:
    processes.add(700, 1, launch="lee-1")
    processes.add(701, 700, "odd) name", launch="lee-1", command="")
    assert find_leftovers()[1] == Leftover(701, "lee-1", "odd) name")


@pytest.mark.parametrize(
    ("parent", "name", "launch", "state"),
    [
        (601, "zspmd-rank0", "lee-1", "S"),
        (602, "python", "lee-1", "S"),
        (600, "zspmd-agent", "", "S"),
        (1, "python", "", "S"),
        (1, "python", "lee-1", "Z"),
        (1, "zspmd-guard", "lee-1", "S"),
    ],
    ids=["below an agent", "below a rank", "an agent", "no launch's", "ended", "a guard within a launch"],
)
def test_others_are_not(processes: Processes, parent: int, name: str, launch: str, state: str) -> None:
    processes.add(600, 1, "zspmd-guard")
    processes.add(601, 600, "zspmd-agent")
    processes.add(602, 601, "zspmd-rank0", launch="lee-1")
    processes.add(700, parent, name, launch=launch, state=state)
    assert find_leftovers() == []


def test_an_agent_that_is_stopped_is_found(processes: Processes) -> None:
    processes.add(601, 1, "zspmd-agent", state="T", command="python -m agent")
    assert find_leftovers() == [Leftover(601, "?", "python -m agent")]


def test_doctor_in_a_rank_does_not_blame_itself(processes: Processes) -> None:
    (processes.root / str(OWN) / "environ").write_bytes(b"ZSPMD_LAUNCH_ID=lee-1\0")
    assert find_leftovers() == []


def test_what_ends_while_it_is_looked_at_is_passed_over(processes: Processes) -> None:
    (processes.root / "700").mkdir()
    processes.add(701, 1, launch="lee-1")
    (processes.root / "701" / "environ").unlink()
    processes.add(702, 1, launch="lee-1")
    (processes.root / "702" / "cmdline").unlink()
    assert find_leftovers() == [Leftover(702, "lee-1", "python")]


def test_a_real_one_is_found_and_not_after_its_end() -> None:
    program = [sys.executable, "-I", "-S", "-c", "print(flush=True); input()"]
    environment = {**os.environ, "ZSPMD_LAUNCH_ID": "left"}
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert [(one.pid, one.launch_id) for one in find_leftovers() if one.launch_id == "left"] == [(process.pid, "left")]
        process.communicate(b"\n")
    assert not [one for one in find_leftovers() if one.launch_id == "left"]
