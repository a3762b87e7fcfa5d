from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from zspmd.errors import ConfigError, EndpointInUseError, LaunchError, ResourceError
from zspmd.runtime.launch import run_directory
from zspmd.runtime.launch.run_directory import LOCK_NAME, MAX_SOCKET_PATH_BYTES, RunDirectory, run_directory_path

# Says "won" and holds on until its stdin closes, or prints the refusal.
CONTENDER = """
import sys
from zspmd.errors import EndpointInUseError
from zspmd.runtime.launch.run_directory import RunDirectory
sys.stdin.readline()
try:
    directory = RunDirectory.create("same")
except EndpointInUseError as error:
    print("lost", error, flush=True)
else:
    print("won", flush=True)
    sys.stdin.readline()
    directory.remove()
"""


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short directory: pytest's own leave no room for socket paths."""
    with tempfile.TemporaryDirectory(prefix="z") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


def test_the_directory_is_private_and_goes_again(runtime_dir: Path) -> None:
    directory = RunDirectory.create("launch")
    assert directory.path == runtime_dir / "zspmd" / "launch"
    assert directory.path.stat().st_mode & 0o777 == 0o700
    assert directory.endpoint("step") == f"ipc://{directory.path}/step"
    (directory.path / "step").write_text("")
    directory.remove()
    directory.remove()
    assert list((runtime_dir / "zspmd").iterdir()) == []


def test_without_a_runtime_directory_the_temporary_one_serves(monkeypatch: pytest.MonkeyPatch, runtime_dir: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_dir / "absent"))
    assert run_directory_path("a") == Path(tempfile.gettempdir()) / f"zspmd-{os.getuid()}" / "a"


def test_a_second_launch_of_the_same_id_is_told_the_pid() -> None:
    first = RunDirectory.create("launch")
    with pytest.raises(EndpointInUseError, match=f"pid {os.getpid()}"):
        RunDirectory.create("launch")
    first.remove()
    RunDirectory.create("launch").remove()


def test_of_eight_launches_at_once_one_wins() -> None:
    contenders = [
        subprocess.Popen([sys.executable, "-c", CONTENDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    for contender in contenders:
        assert contender.stdin is not None
        contender.stdin.write("go\n")
        contender.stdin.flush()
    answers = []
    for contender in contenders:
        assert contender.stdout is not None
        answers.append(contender.stdout.readline().split(maxsplit=1)[0])
    for contender in contenders:
        contender.communicate(timeout=10)
    assert sorted(answers) == ["lost"] * 7 + ["won"]
    assert not run_directory_path("same").exists()


def test_what_a_dead_launch_left_is_taken_over() -> None:
    path = run_directory_path("stale")
    path.mkdir(parents=True, mode=0o700)
    path.parent.chmod(0o700)
    (path / LOCK_NAME).write_text("999999\n")
    (path / "step").write_text("")
    (path / "more").mkdir()
    directory = RunDirectory.create("stale")
    assert [entry.name for entry in path.iterdir()] == [LOCK_NAME]
    assert (path / LOCK_NAME).read_text().strip() == str(os.getpid())
    directory.remove()


def leave_dead(name: str) -> Path:
    """Make what a launch leaves when driver and agent are killed."""
    path = run_directory_path(name)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700)
    (path / LOCK_NAME).write_text("999999\n")
    (path / "step").write_text("")
    return path


def test_a_launch_removes_what_dead_ones_of_other_ids_left_and_nothing_else() -> None:
    live = RunDirectory.create("live")
    dead = [leave_dead("dead"), leave_dead("gone"), run_directory_path("without-lock")]
    dead[-1].mkdir(mode=0o700)
    not_ours = run_directory_path("not-ours")  # something lies in it, and there is no lock
    not_ours.mkdir()
    (not_ours / "file").write_text("")
    RunDirectory.create("next").remove()
    assert [path.exists() for path in dead] == [False, False, False]
    assert (not_ours / "file").exists()
    assert (live.path / LOCK_NAME).exists()
    live.remove()


def test_a_directory_that_is_removed_before_its_maker_has_locked_it_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    real_mkdir = Path.mkdir
    removed: list[str] = []

    def mkdir_and_lose(path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        real_mkdir(path, mode, parents, exist_ok)
        if path.name == "launch" and not removed:
            removed.extend(run_directory.remove_dead_directories())

    monkeypatch.setattr(Path, "mkdir", mkdir_and_lose)
    directory = RunDirectory.create("launch")
    assert removed == ["launch"]
    assert (directory.path / LOCK_NAME).exists()
    directory.remove()


def test_a_handed_over_directory_is_held_and_can_be_taken_by_each_who_has_the_other_end() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        with ours:
            assert RunDirectory.handed_over(theirs) is None
            directory = RunDirectory.create("launch")
            directory.hand_over(ours)
        os.close(directory.lock_fd)  # as the driver's death does
        with pytest.raises(EndpointInUseError):
            RunDirectory.create("launch")
        taken = [RunDirectory.handed_over(theirs), RunDirectory.handed_over(theirs)]
        for taker in taken:
            assert taker is not None
            assert taker.path == directory.path
            taker.remove()
        assert not directory.path.exists()


def test_where_the_driver_ended_before_it_handed_a_directory_over_there_is_none() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        ours.close()
        assert RunDirectory.handed_over(theirs) is None


def test_a_launch_waits_for_somebody_who_only_looks_whether_its_directory_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    path = leave_dead("launch")
    monkeypatch.setattr(run_directory, "remove_dead_directories", list)
    with open(path / LOCK_NAME) as looker:
        fcntl.flock(looker, fcntl.LOCK_EX)
        waits: list[float] = []

        def let_go(seconds: float) -> None:
            waits.append(seconds)
            fcntl.flock(looker, fcntl.LOCK_UN)

        monkeypatch.setattr("time.sleep", let_go)
        RunDirectory.create("launch").remove()
    assert len(waits) == 1


def test_a_lock_that_outlives_the_process_in_it_is_respected() -> None:
    path = leave_dead("launch")
    with open(path / LOCK_NAME) as agent:  # whose driver is dead
        fcntl.flock(agent, fcntl.LOCK_EX)
        with pytest.raises(EndpointInUseError, match="pid 999999"):
            RunDirectory.create("launch")


def test_removing_leaves_a_successor_alone() -> None:
    first = RunDirectory.create("launch")
    (first.path / LOCK_NAME).unlink()
    second = RunDirectory.create("launch")
    first.remove()
    assert (second.path / LOCK_NAME).exists()
    with pytest.raises(EndpointInUseError):
        RunDirectory.create("launch")
    second.remove()


@pytest.mark.parametrize("looks_for_dead", [True, False], ids=["while it looks for dead ones", "while it takes its own"])
def test_a_lock_of_a_removed_directory_is_not_taken_for_ours(monkeypatch: pytest.MonkeyPatch, looks_for_dead: bool) -> None:
    """A contender that opened the lock before its owner removed it must start over."""
    if not looks_for_dead:
        monkeypatch.setattr(run_directory, "remove_dead_directories", list)
    owner = RunDirectory.create("launch")
    real_flock = fcntl.flock
    locked: list[int] = []

    def remove_then_lock(fd: int, operation: int) -> None:
        if not locked:
            owner.remove()
        locked.append(fd)
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    contender = RunDirectory.create("launch")
    assert len(locked) == 2
    assert (contender.path / LOCK_NAME).exists()
    contender.remove()


def test_long_ids_have_short_and_different_directories() -> None:
    paths = {run_directory_path("x" * 63 + letter) for letter in "ab"}
    assert len(paths) == 2
    assert all(len(path.name) <= 24 for path in paths)


def test_a_socket_path_that_is_too_long_is_refused_early(monkeypatch: pytest.MonkeyPatch, runtime_dir: Path) -> None:
    directory = RunDirectory.create("launch")
    room = MAX_SOCKET_PATH_BYTES - len(str(directory.path)) - 1
    assert directory.endpoint("s" * room).endswith("s")
    with pytest.raises(ConfigError, match="107 are possible"):
        directory.endpoint("s" * (room + 1))
    directory.remove()
    deep = runtime_dir / ("d" * 90)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(ConfigError, match="shorter path"):
        RunDirectory.create("launch")


@pytest.mark.parametrize("kind", ["open", "link", "file"])
def test_a_parent_that_is_not_private_is_refused(runtime_dir: Path, kind: str) -> None:
    parent = runtime_dir / "zspmd"
    if kind == "open":
        parent.mkdir()
        parent.chmod(0o755)
    elif kind == "link":
        (runtime_dir / "elsewhere").mkdir(mode=0o700)
        parent.symlink_to(runtime_dir / "elsewhere")
    else:
        parent.write_text("")
    with pytest.raises(LaunchError, match=str(parent)):
        RunDirectory.create("launch")


def test_no_temporary_directory_is_named_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", refuse)
    with pytest.raises(ResourceError, match=r"found in \['/tmp', '/var/tmp'\]: each is missing, full or read-only; set XDG_RUNTIME_DIR"):
        run_directory_path("any")


@pytest.mark.parametrize("call", ["os.ftruncate", "os.pwrite"])
def test_a_full_disk_leaves_no_directory_and_no_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with monkeypatch.context() as full:
        full.setattr(call, refuse)
        with pytest.raises(ResourceError, match=r"cannot use the run directory .*No space left on device; the disk is full"):
            RunDirectory.create("full")
    assert list((tmp_path / "zspmd").iterdir()) == []
    RunDirectory.create("full").remove()


def test_the_runtime_directory_of_another_user_is_left_alone(runtime_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``su`` and ``sudo`` leave the variable: what root made there would shut its owner out."""
    assert run_directory_path("x").parent == runtime_dir / "zspmd"
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert run_directory_path("x").parent == Path(tempfile.gettempdir()) / "zspmd-12345"
