"""Limits of cgroups: the lowest from this process's own up to the root."""

from __future__ import annotations

from pathlib import Path

import pytest

from zspmd.runtime.launch.checks import cgroup_limits
from zspmd.runtime.launch.checks.cgroup_limits import cgroup_cores, cgroup_limit


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    root = tmp_path / "cgroup"
    (root / "user.slice" / "session").mkdir(parents=True)
    (tmp_path / "own").write_text("1:name=systemd:/other\n0::/user.slice/session\n")
    monkeypatch.setattr(cgroup_limits, "_OWN", tmp_path / "own")
    monkeypatch.setattr(cgroup_limits, "_ROOT", root)
    return root


@pytest.mark.parametrize(
    ("at_root", "above", "own", "limit"),
    [
        ("max", "max", "max", None),
        (None, None, None, None),
        (None, "500", "max", 500),
        (None, "500", "200", 200),
        ("100", "500", "200", 100),
    ],
    ids=["no limit", "no files", "above", "own", "of a container"],
)
def test_the_lowest_limit_counts(root: Path, at_root: str | None, above: str | None, own: str | None, limit: int | None) -> None:
    for folder, text in ((root, at_root), (root / "user.slice", above), (root / "user.slice" / "session", own)):
        if text is not None:
            (folder / "pids.max").write_text(f"{text}\n")
    assert cgroup_limit("pids.max") == limit


def test_a_share_of_time_is_told_in_cores(root: Path) -> None:
    assert cgroup_cores() is None
    (root / "cpu.max").write_text("max 100000\n")
    assert cgroup_cores() is None
    (root / "user.slice" / "cpu.max").write_text("250000 100000\n")
    (root / "user.slice" / "session" / "cpu.max").write_text("400000 100000\n")
    assert cgroup_cores() == 2.5


def test_a_path_outside_the_mounted_tree_reads_nothing_else(root: Path, tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/../elsewhere\n")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "pids.max").write_text("7\n")
    assert cgroup_limit("pids.max") is None
    (root / "pids.max").write_text("70\n")
    assert cgroup_limit("pids.max") == 70


def test_a_kernel_without_cgroups_has_no_limits(root: Path, tmp_path: Path) -> None:
    (tmp_path / "own").unlink()
    (root / "pids.max").write_text("5\n")
    assert cgroup_limit("pids.max") is None
