"""The checks of ``zspmd-run doctor``: each says what is wrong on a machine where it is."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import shutil
import socket
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.leaks import LeakCheck
from support.script_runs import run

from zspmd.runtime.launch import checks
from zspmd.runtime.launch.checks import FAIL, MACHINE_CHECKS, OK, WARN, Check
from zspmd.runtime.launch.run_directory import LOCK_NAME, run_directory_path
from zspmd.runtime.programs.doctor import _judge_torch

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("examine", MACHINE_CHECKS, ids=lambda examine: examine.__name__)
def test_every_check_that_is_not_ok_says_what_to_mend(examine: type[Check]) -> None:
    check = examine()  # type: ignore[call-arg]  # a function, which pytest's parameters cannot say
    assert check.status in (OK, WARN, FAIL)
    assert check.text
    assert bool(check.advice) == (check.status != OK)


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    check = checks.check_python()
    assert (check.status, check.advice) == (FAIL, "install Python 3.10 or newer")


def test_missing_and_old_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["no-such-package>=1", "pytest>=999", "numpy>=1.2; extra == 'x'"])
    check = checks.check_packages()
    assert check.status == FAIL
    assert check.text.startswith("no-such-package is missing; pytest ")
    assert check.text.endswith(" is older than 999")
    assert check.advice == "pip install --upgrade no-such-package pytest"


def test_low_limits_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda number: (256, 256))
    check = checks.check_limits()
    assert (check.status, check.advice) == (WARN, "many ranks may not fit: ulimit -n 4096 and ulimit -u 4096")


def test_limits_that_no_launch_fits_into_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda number: (40, 40))
    check = checks.check_limits()
    assert check.status == FAIL
    assert "a launch of 1 rank needs 72 more" in check.advice


def test_a_small_shared_memory_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    check = checks.check_shared_memory()
    assert check.status == WARN
    assert "--shm-size" in check.advice


def test_a_name_without_an_address_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no such host")
    check = checks.check_host()
    assert check.status == WARN
    assert "GLOO_SOCKET_IFNAME=lo" in check.advice


def test_a_kernel_without_pidfds_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("os.pidfd_open", refuse)
    check = checks.check_kernel()
    assert check.status == FAIL
    assert "pidfd_open: [Errno 38]" in check.text


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Hand out a directory whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="z") as path:
        yield Path(path)


def test_a_run_directory_that_others_can_read_fails(monkeypatch: pytest.MonkeyPatch, short_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    (short_path / "zspmd").mkdir(mode=0o755)
    check = checks.check_run_directory()
    assert check.status == FAIL
    assert "is not a directory with mode 0700" in check.text


def test_what_dead_launches_left_is_removed_and_named(leak_check: LeakCheck) -> None:
    path = run_directory_path("dead")
    path.mkdir(mode=0o700, parents=True)
    path.parent.chmod(0o700)
    (path / LOCK_NAME).touch()
    assert "removed what dead launches had left: dead" in checks.check_run_directory().text
    assert not path.exists()


@pytest.mark.parametrize(
    ("cuda", "words"), [(None, "has no CUDA in it"), ("12.8", "finds no usable driver")], ids=["cpu build", "cuda build"]
)
def test_a_torch_that_does_not_see_the_gpus_is_warned_of(monkeypatch: pytest.MonkeyPatch, cuda: str | None, words: str) -> None:
    monkeypatch.setattr("zspmd.runtime.programs.doctor.num_cuda_devices", lambda: 2)
    check = _judge_torch({"version": "2.9", "cuda": cuda, "available": False, "devices": 0, "gloo": True, "nccl": False})
    assert check.status == WARN
    assert words in check.advice


def test_the_doctor_tells_of_every_check_and_whether_all_is_well(leak_check: LeakCheck) -> None:
    done = run("doctor", "--json")
    told = json.loads(done.stdout)
    assert [check["name"] for check in told][-2:] == ["torch", "launch"]
    assert len(told) == len(MACHINE_CHECKS) + 2
    assert done.returncode == int(any(check["status"] == FAIL for check in told)) == 0, told


def test_the_doctor_fails_where_no_launch_works(leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch, short_path: Path) -> None:
    (short_path / "zspmd").write_text("not a directory")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    done = run("doctor")
    assert done.returncode == 1
    assert f"FAIL  run directory  {short_path}/zspmd" in done.stdout or f"cannot make the run directory {short_path}/zspmd" in done.stdout
