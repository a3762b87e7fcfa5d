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
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.leaks import LeakCheck
from support.script_runs import run

from zspmd.errors import BadFrameError
from zspmd.runtime.launch.agent_protocol import RecordReader, encode_record
from zspmd.runtime.launch.checks import machine as checks
from zspmd.runtime.launch.checks.check_records import FAIL, OK, WARN, Check, MachineChecks
from zspmd.runtime.launch.checks.leftovers import Leftover
from zspmd.runtime.launch.checks.machine import MACHINE_CHECKS
from zspmd.runtime.launch.checks.torch_check import judge_torch
from zspmd.runtime.launch.run_directory import LOCK_NAME, run_directory_path

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("examine", MACHINE_CHECKS, ids=lambda examine: examine.__name__)
def test_every_check_that_is_not_ok_says_what_to_mend(examine: Callable[[], Check]) -> None:
    check = examine()
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


def test_a_low_limit_of_the_cgroup_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "cgroup_limit", lambda name: 100)
    monkeypatch.setattr(resource, "getrlimit", lambda number: (1 << 20, 1 << 20))
    check = checks.check_limits()
    assert (check.status, check.advice) == (WARN, "many ranks may not fit: a higher limit of pids for the container or session")
    assert check.text.endswith(", this cgroup may have 100 processes and threads")


def test_a_cgroup_s_share_of_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "cgroup_cores", lambda: 1.5)
    assert ", this cgroup may use the time of 1.5" in checks.check_cores().text


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 17 22:55:48 UTC 2024\n", ", driver 535.161.08"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n", ", driver 570.86.10"),
        (None, ""),
    ],
    ids=["closed", "open", "none"],
)
def test_the_driver_s_version_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, version: str) -> None:
    monkeypatch.setattr(checks, "_DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(checks, "num_cuda_devices", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert checks.check_devices() == Check("devices", OK, f"2 CUDA devices{version}")


@pytest.mark.parametrize(
    ("program", "status", "text"),
    [
        ("exit 0", OK, "nobody computes on them"),
        ("echo '123, python, 1024 MiB'; echo '124, /opt/a b, [N/A]'", WARN, "123 python 1024 MiB; 124 /opt/a b [N/A]"),
        ("exit 9", WARN, "nvidia-smi fails: Command "),
        ("exec sleep 60", WARN, "nvidia-smi fails: Command "),
    ],
    ids=["free", "in use", "no driver", "hangs"],
)
def test_who_else_uses_the_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str, status: str, text: str) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(checks, "num_cuda_devices", lambda: 1)
    monkeypatch.setattr(checks, "_SMI_S", 0.5)
    check = checks.check_device_use()
    assert check.status == status
    assert check.text.startswith(text)
    assert bool(check.advice) == (status != OK)


def test_where_there_are_no_gpus_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "num_cuda_devices", lambda: 0)
    assert checks.check_device_use() == Check("device use", OK, "no GPUs, or no nvidia-smi to tell")


def test_processes_that_a_launch_has_left_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_leftovers", lambda: [Leftover(7, "lee-1", "python x.py"), Leftover(8, "lee-1", "sleep 9")])
    assert checks.check_leftovers() == Check(
        "leftovers",
        WARN,
        "no agent above pid 7 of launch lee-1 (python x.py); pid 8 of launch lee-1 (sleep 9)",
        "if their launch has ended: kill -9 7 8",
    )


def test_all_checks_travel_as_one_record() -> None:
    told = checks.check_machine()
    assert [check.name for check in told.checks] == [examine().name for examine in MACHINE_CHECKS]
    assert list(RecordReader().feed(encode_record(told))) == [told]
    with pytest.raises(BadFrameError, match=r"Check\.status is 'fine', not one of ok, warn, FAIL"):
        encode_record(MachineChecks((Check("a", "fine", "b"),)))


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
def test_a_torch_that_does_not_see_the_gpus_is_warned_of(cuda: str | None, words: str) -> None:
    told = {"version": "2.9", "cuda": cuda, "available": False, "devices": 0, "gloo": True, "nccl": False}
    check = judge_torch(0, f"a warning of torch's\n{json.dumps(told)}\n", "", 2)
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
