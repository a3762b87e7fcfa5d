"""The directory of a launch's log files: made, cleaned, locked, pointed to, and removed when it is old."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from zspmd.errors import ConfigError
from zspmd.runtime.launch.cli import main
from zspmd.runtime.launch.command.log_directory import LauncherLog, log_path, open_log_directory, remove_old_directories, state_path


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "zspmd"


def make(launch_id: str) -> None:
    directory = open_log_directory(launch_id)
    assert directory is not None
    directory.close()


def test_a_launch_gets_a_directory_of_its_own_and_latest_leads_to_it(state: Path) -> None:
    make("one")
    make("two")
    assert sorted(os.listdir(state)) == ["latest", "one", "two"]
    assert (state / "latest").resolve() == state / "two"
    assert (state / "two").stat().st_mode & 0o777 == 0o700
    assert log_path("one") == state / "one"


def test_what_an_earlier_launch_of_the_same_id_has_left_goes(state: Path) -> None:
    make("one")
    (state / "one" / "r00005.out").write_text("old")
    (state / "one" / "launcher.log").write_text("old")
    make("one")
    assert {path.name: path.read_text() for path in (state / "one").iterdir()} == {"launcher.log": ""}


def test_a_live_launch_keeps_its_directory(state: Path) -> None:
    first = open_log_directory("one")
    assert first is not None
    (state / "one" / "r00000.out").write_text("mine")
    assert open_log_directory("one") is None
    assert (state / "one" / "r00000.out").read_text() == "mine"
    first.close()
    first.close()
    make("one")


def test_the_newest_are_kept_and_live_ones_whatever_their_age(state: Path) -> None:
    live = open_log_directory("live")
    assert live is not None
    for number in range(6):
        make(f"id-{number}")
    for age, name in enumerate(["id-5", "id-4", "id-3", "id-2", "id-1", "id-0", "live"]):
        os.utime(state / name, (1e9 - age, 1e9 - age))
    (state / "not-a-launch").mkdir()
    os.utime(state / "not-a-launch", (1, 1))
    assert sorted(remove_old_directories(state, 4)) == ["id-0", "id-1"]
    assert sorted(os.listdir(state)) == ["id-2", "id-3", "id-4", "id-5", "latest", "live", "not-a-launch"]
    live.close()


def test_an_id_that_is_the_link_s_name(state: Path) -> None:
    make("one")
    (state / "one" / "r00000.out").write_text("kept")
    make("latest")
    assert (state / "one" / "r00000.out").read_text() == "kept"
    assert (state / "latest").resolve() == state / "latest_"


def test_without_the_variable_it_is_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("", "relative/path"):
        monkeypatch.setenv("XDG_STATE_HOME", text)
        assert state_path() == tmp_path / ".local" / "state" / "zspmd"


def test_no_launch_id_leaves_the_directory() -> None:
    with pytest.raises(ConfigError, match="launch id"):
        log_path("../elsewhere")


def test_a_disk_that_takes_no_more_is_told_once(tmp_path: Path) -> None:
    told: list[str] = []
    log = LauncherLog("/dev/full", told.append)
    log.write("one")
    log.write("two")
    assert told == ["/dev/full takes no more: No space left on device; the launch goes on"]
    (tmp_path / "log").write_text("before\n")
    LauncherLog(str(tmp_path / "log"), told.append).write("after")
    assert (tmp_path / "log").read_text() == "before\nafter\n"
    LauncherLog(None, told.append).write("nowhere")
    assert len(told) == 1


def test_a_dry_run_makes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["--dry-run", "--launch-id", "plan", "train.py"]) == 0
    assert f"logs     {tmp_path}/zspmd/plan\n" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]
