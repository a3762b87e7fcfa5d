"""Too little of what the system gives: descriptors, processes, memory, disk, paths, streams.

A launch works, or it ends with an error that says what there was too little of; either way nothing of it is left. What is taken away
is taken from a driver program of its own (``support.launch_once``), so that the process of the tests keeps what it needs.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.groups import launch
from support.leaks import LeakCheck
from support.script_runs import RUN, script

from zspmd.errors import LaunchError, WorkerExitedError, WorkerRaisedError
from zspmd.runtime.launch.agent_protocol import RankStart, Start
from zspmd.runtime.launch.command.exit_codes import START_FAILED
from zspmd.runtime.launch.resources import num_files_needed
from zspmd.runtime.launch.supervisor import NodeSupervisor
from zspmd.transport.recording import EntryFile, EntryKind

TESTS = Path(__file__).parents[1]
END_S = 60.0
# An unprivileged user that still may read what root has installed: RLIMIT_NPROC does not bind root.
NOBODY = (
    "setpriv",
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--inh-caps=-all,+dac_override",
    "--ambient-caps=-all,+dac_override",
)


@dataclass(frozen=True)
class Outcome:
    """How a driver program ended; ``code`` as in subprocess, the rest as it told, or empty."""

    code: int
    error: str
    text: str
    left: tuple[str, ...]
    log: str

    @property
    def works(self) -> bool:
        return self.code == 0 and not self.error


def run(order: dict[str, Any], *, before: tuple[str, ...] = (), cwd: Path = TESTS, **environment: str) -> Outcome:
    """Run ``support.launch_once`` to its end; ``before`` are the words that execute it."""
    paths = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))
    argv = [*before, sys.executable, "-m", "support.launch_once", json.dumps(order)]
    done = subprocess.run(
        argv, cwd=cwd, capture_output=True, text=True, timeout=END_S, env={**os.environ, "PYTHONPATH": paths, **environment}
    )
    has_told = done.returncode == 0 and "tell" not in order
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if has_told else {"error": "", "text": "", "left": []}
    return Outcome(done.returncode, told["error"], told["text"], tuple(told["left"]), done.stderr)


def small_disk(directory: Path, options: str) -> tuple[str, ...]:
    """Return what executes a program with a file system of its own at ``directory``; skips where nobody may mount one."""
    script = 'mount -t tmpfs -o "$1" tmpfs "$2" && shift 2 && exec "$@"'
    words = ("unshare", "--mount", "sh", "-c", script, "sh", options, str(directory))
    directory.mkdir(exist_ok=True)
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of its own")
    return words


def quick_of(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Return parameters of which all but ``quick`` are for the long run."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.long) for value in values]


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[Path]:
    """Yield the directory of a new cgroup of either version with so much memory; skips where nobody may make one."""
    for parent, file in ((Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"), (Path("/sys/fs/cgroup"), "memory.max")):
        directory = parent / f"zspmd-test-{os.getpid()}"
        try:
            directory.mkdir()
        except OSError:
            continue
        try:
            if not (directory / file).exists():
                continue
            (directory / file).write_text(str(limit_bytes))
            yield directory
            return
        finally:
            directory.rmdir()
    pytest.skip("this user may not make a cgroup with a memory limit")


# --- descriptors ---


def test_every_limit_of_descriptors_below_what_a_launch_needs_is_named_before_anything_is_bound(leak_check: LeakCheck) -> None:
    async def attempt(limit: int) -> str:
        workers = launch("Echo")
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, highest))
        try:
            with pytest.raises(LaunchError) as caught:
                await workers.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (before, highest))
        assert leak_check.run_directories() == []
        return f"{type(caught.value).__name__}: {caught.value}"

    before, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/proc/self/fd"))
    texts = [asyncio.run(attempt(limit)) for limit in range(num_open + 4, num_open + num_files_needed(2))]
    wrong = [text for text in texts if not text.startswith("ResourceError: this process may open ") or "ulimit -n" not in text]
    assert wrong == []


@pytest.mark.parametrize("world_size", [2, pytest.param(8, marks=pytest.mark.long)])
@pytest.mark.usefixtures("leak_check")
def test_a_launch_works_with_the_descriptors_that_it_asks_for(world_size: int) -> None:
    order = {"worker": "Reducer", "world_size": world_size, "options": {"preload": ["torch"], "communicator": "gloo"}}
    refused = run({**order, "files": 20})
    assert refused.error == "ResourceError"
    wanted = int(refused.text.partition("ulimit -n ")[2].partition(",")[0])
    assert run({**order, "files": wanted + 2}).works, "the number of those that are open may differ a little from run to run"


@pytest.mark.parametrize("files", quick_of(range(8, 60), 16, 22, 36))
def test_running_out_of_descriptors_in_the_middle_leaves_nothing(leak_check: LeakCheck, files: int) -> None:
    outcome = run({"files": files, "unchecked": True})
    leak_check.wait_gone()
    is_clear = outcome.error in ("ResourceError", "LaunchError") and "Too many open files" in outcome.text
    was_libzmq = outcome.code == -signal.SIGABRT and "Too many open files (src/" in outcome.log  # why there is a check before
    assert outcome.works or is_clear or was_libzmq, outcome


@pytest.mark.parametrize(
    ("order", "error"), [({"coordinate": True}, ""), ({"kill": 1}, "WorkerExitedError")], ids=["works", "loses a rank"]
)
@pytest.mark.usefixtures("leak_check")
def test_a_driver_that_has_no_descriptor_left_goes_on_and_ends_in_order(order: dict[str, Any], error: str) -> None:
    outcome = run({"worker": "Meeting", "exhaust": True, **order})
    assert (outcome.code, outcome.error) == (0, error), outcome


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
async def test_an_agent_that_runs_out_of_descriptors_ends_the_launch_and_says_so(leak_check: LeakCheck, start_method: str) -> None:
    ranks = tuple(RankStart(rank, dict(os.environ), b"") for rank in range(24))
    order = Start(ranks, start_method=start_method, argv=("sleep", "1000"), entry="signal:pause", cwd="/", kill_s=1.0)
    supervisor = NodeSupervisor(lambda event: None)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, before[1]))
    try:
        supervisor.open()
        with pytest.raises(LaunchError, match=r"a rank cannot be started: .*Too many open files.*raise `ulimit -n`"):
            await supervisor.start(order, timeout_s=END_S)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_rank_that_runs_out_of_descriptors_says_so_itself(leak_check: LeakCheck) -> None:
    async with launch("Starved") as workers:
        with pytest.raises(WorkerRaisedError, match="Too many open files") as caught:
            await workers.step({1: "files"})
        assert caught.value.rank == 1


def test_a_script_gets_the_same_word_on_too_few_descriptors(leak_check: LeakCheck) -> None:
    done = subprocess.run(["prlimit", "--nofile=60", *RUN, "-n", "4", script("facts")], capture_output=True, text=True, timeout=END_S)
    assert done.returncode == START_FAILED
    assert re.match(r"zspmd-run: this process may open 60 files and has \d+ open; a launch of 4 ranks needs 96 more: ", done.stderr)


# --- processes ---


@pytest.mark.parametrize("processes", quick_of(range(2, 40), 4, 9, 12))
def test_a_limit_of_processes_is_named(leak_check: LeakCheck, processes: int) -> None:
    if os.getuid() != 0 or subprocess.run([*NOBODY, "true"], capture_output=True).returncode:
        pytest.skip("only root can become a user without processes")
    outcome = run({}, before=(*NOBODY, "prlimit", f"--nproc={processes}"))
    leak_check.wait_gone()
    is_clear = outcome.error == "LaunchError" and re.search("no process|Resource temporarily unavailable", outcome.text)
    is_checked = outcome.error == "ResourceError" and "threads that a launch needs" in outcome.text
    is_rank = outcome.error.startswith("Worker") and ("Resource temporarily" in outcome.text or "can't start new thread" in outcome.text)
    assert outcome.works or is_clear or is_checked or is_rank, outcome


# --- memory ---


@pytest.mark.parametrize("communicator", ["shm", pytest.param("gloo", marks=pytest.mark.long)])
@pytest.mark.usefixtures("leak_check")
def test_a_small_dev_shm_is_enough(communicator: str) -> None:
    options = {"preload": ["torch"], "communicator": communicator}
    outcome = run({"worker": "Reducer", "options": options}, before=small_disk(Path("/dev/shm"), "size=1m"))
    assert outcome.works, outcome


async def test_a_rank_without_memory_of_its_own_is_named(leak_check: LeakCheck) -> None:
    async with launch("Starved") as workers:
        with pytest.raises(WorkerRaisedError, match="Unable to allocate") as caught:
            await workers.step({1: "memory"})
        assert caught.value.rank == 1


async def test_a_rank_that_the_kernel_kills_for_memory_is_named_with_that_hint(leak_check: LeakCheck) -> None:
    with memory_cgroup(256 << 20) as cgroup:
        async with launch("Starved") as workers:
            with pytest.raises(WorkerExitedError, match="the kernel's out-of-memory killer may have") as caught:
                await workers.step({1: "cgroup", "procs": str(cgroup / "cgroup.procs")})
        assert (caught.value.rank, caught.value.exit_code) == (1, -signal.SIGKILL)


async def test_a_rank_without_memory_to_share_is_named_while_its_peer_waits(leak_check: LeakCheck) -> None:
    async with launch("Starved", preload=("torch",), communicator="shm") as workers:
        with pytest.raises(WorkerRaisedError, match=r"cannot allocate the .* B of memory that the 2 ranks of axis tp share") as caught:
            await workers.step({0: "shared memory"})
        assert caught.value.rank == 0


# --- disk ---


@pytest.mark.parametrize(
    "options", quick_of([*(f"nr_inodes={number}" for number in range(1, 7)), "ro"], "nr_inodes=3", "nr_inodes=4", "ro")
)
def test_a_run_directory_that_cannot_be_made_is_named_and_nothing_stays(leak_check: LeakCheck, options: str) -> None:
    disk = leak_check.runtime_dir / "d"
    before = small_disk(disk, options)
    outcome = run({"look": str(disk)}, before=before, XDG_RUNTIME_DIR=str(disk))
    assert outcome.error in ("ResourceError", "LaunchError"), outcome
    assert ("Read-only file system" if options == "ro" else "No space left on device") in outcome.text
    assert outcome.left in ((), ("zspmd",))
    shutil.rmtree(disk)


@pytest.mark.parametrize("num_inodes", [1, 2, 4], ids=["directory", "first file", "a later rank's"])
@pytest.mark.usefixtures("leak_check")
def test_a_log_file_that_cannot_be_made_is_the_cause_and_no_rank_is(tmp_path: Path, num_inodes: int) -> None:
    disk = tmp_path / "disk"
    outcome = run({"options": {"log_dir": str(disk / "logs")}}, before=small_disk(disk, f"nr_inodes={num_inodes}"))
    assert outcome.error in ("LaunchError", "ResourceError"), outcome
    assert "No space left on device" in outcome.text
    assert str(disk / "logs") in outcome.text


@pytest.mark.usefixtures("leak_check")
def test_a_full_disk_under_the_logs_is_one_warning_a_file_and_holds_nobody_up(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    order = {"worker": "Chatter", "options": {"log_dir": str(disk)}}
    outcome = run(order, before=small_disk(disk, "size=64k"))
    assert outcome.works, outcome
    assert outcome.log.count("r00000.out is written no further: [Errno 28]") == 1
    assert outcome.log.count("r00001.out is written no further: [Errno 28]") == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [("nr_inodes=1", "ConfigError", "record is .*which cannot be made"), ("nr_inodes=2", "WorkerRaisedError", "rank . cannot record")],
    ids=["driver", "rank"],
)
@pytest.mark.usefixtures("leak_check")
def test_a_recording_that_cannot_be_made_is_named(tmp_path: Path, options: str, error: str, words: str) -> None:
    disk = tmp_path / "disk"
    outcome = run({"options": {"record": str(disk / "rec")}}, before=small_disk(disk, options))
    assert outcome.error == error
    assert re.search(f"{words}.*No space left on device", outcome.text), outcome


@pytest.mark.usefixtures("leak_check")
def test_a_full_disk_ends_a_recording_and_not_the_launch(tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    before = small_disk(disk, "size=8k")
    order = {"worker": "Reducer", "options": {"record": str(disk / "rec"), "preload": ["torch"], "communicator": "shm"}}
    keep = ("sh", "-c", '"$@"; code=$?; cp -r "$0" "${0%/*}/kept"; exit $code', str(disk))
    outcome = run(order, before=(*before, *keep))
    assert outcome.works, outcome
    assert "ends after" in outcome.log
    assert "what is recorded goes on without it" in outcome.log
    whole = EntryFile.open(str(kept / "rec"))
    assert next(iter(whole)).kind is EntryKind.LAUNCH, "what was written first can be read"


# --- paths, streams, environment ---


@pytest.mark.usefixtures("leak_check")
def test_a_path_too_long_for_a_socket_is_named_before_anything_is_made(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    outcome = run({"look": str(deep)}, XDG_RUNTIME_DIR=str(deep))
    assert (outcome.error, outcome.left) == ("ConfigError", ())
    assert "bytes where 107 are possible; set XDG_RUNTIME_DIR" in outcome.text


@pytest.mark.usefixtures("leak_check")
def test_a_current_directory_that_was_removed_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    outcome = run({"remove_cwd": True}, cwd=gone)
    assert (outcome.error, outcome.text[:33]) == ("ConfigError", "the current directory was removed"), outcome


@pytest.mark.usefixtures("leak_check")
def test_an_environment_without_home_user_and_path_is_enough() -> None:
    outcome = run({}, before=("env", "-u", "HOME", "-u", "USER", "-u", "LOGNAME", "-u", "PATH", "-u", "LANG"))
    assert outcome.works, outcome


@pytest.mark.parametrize("closed", quick_of(["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"], "2>&-", "<&- >&- 2>&-"))
def test_closed_standard_streams_do_no_harm(leak_check: LeakCheck, tmp_path: Path, closed: str) -> None:
    told = tmp_path / "told"
    order = {"options": {"preload": ["this"]}, "tell": str(told)}  # it prints, into whatever took the place of standard output
    outcome = run(order, before=("sh", "-c", f'exec "$@" {closed}', "sh"))
    assert json.loads(told.read_text())["error"] == "", outcome
