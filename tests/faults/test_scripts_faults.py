"""Scripts that fail, hang or do not listen: which rank is blamed, what the exit code says, and that nothing is left."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.leaks import LeakCheck
from support.polling import block_until
from support.script_runs import RUN, begin, run, script


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ``ends.py`` writes the pid of each rank."""
    monkeypatch.setenv("PIDS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("7", 7, "exited with code 7"),
        ("SIGSEGV", 139, "was ended by SIGSEGV"),
        ("SIGKILL", 137, "was ended by SIGKILL"),
        ("raise", 1, "exited with code 1"),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed(leak_check: LeakCheck, pids: Path, how: str, code: int, words: str) -> None:
    done = run("-n", "3", script("ends"), "wait", how, "wait")
    assert done.returncode == code
    pid = (pids / "1").read_text()
    assert f"[zspmd] FAILED with exit code {code}\n  first cause  rank 1 on " in done.stderr
    assert re.search(rf"first cause  rank 1 on .*, pid {pid}, {words}", done.stderr)
    for rank in (0, 2):
        assert f"rank {rank} was ended by zspmd-run (SIGTERM), +" in done.stderr


def test_a_rank_that_is_done_early_is_no_failure(leak_check: LeakCheck, pids: Path) -> None:
    done = run("-n", "3", script("ends"), "0", "after:0:0", "after:1:0")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["rank 0 first", "rank 1 first"])
def test_of_two_failures_the_first_is_the_cause(leak_check: LeakCheck, pids: Path, order: tuple[int, int]) -> None:
    first, second = order
    how = {first: "7", second: f"after:{first}:9"}
    done = run("-n", "2", script("ends"), how[0], how[1])
    assert done.returncode == 7
    assert f"first cause  rank {first} on" in done.stderr
    assert re.search(rf"then\n    rank {second} (exited with code 9|was ended by zspmd-run)", done.stderr)


def test_a_lost_peer_is_not_blamed_though_it_ends_first(leak_check: LeakCheck, pids: Path) -> None:
    done = run("-n", "3", script("ends"), "lost", "after:0:raise", "wait")
    assert done.returncode == 1
    assert "first cause  rank 1 on" in done.stderr
    assert "    ValueError: the reason of them all\n  then\n    rank 0 exited with code 1, -" in done.stderr
    assert "Connection closed by peer" in done.stderr.partition("  then\n")[2]


def test_a_lost_peer_alone_is_the_cause_after_all(leak_check: LeakCheck, pids: Path) -> None:
    done = run("-n", "2", script("ends"), "lost", "wait")
    assert done.returncode == 1
    assert "first cause  rank 0 on" in done.stderr
    assert "rank 1 was ended by zspmd-run (SIGTERM)" in done.stderr


@pytest.mark.parametrize("record", [[], ["record"]], ids=["plain", "with @record"])
def test_a_rank_that_raises_while_another_hangs_in_a_collective_is_named_with_its_traceback(
    leak_check: LeakCheck, record: list[str]
) -> None:
    done = run("-n", "2", script("collective_failure"), *record)
    assert done.returncode == 1
    summary = done.stderr.partition("[zspmd] FAILED")[2]
    assert re.search(r"first cause  rank 1 on .*, pid \d+, exited with code 1", summary)
    assert "  traceback\n    Traceback (most recent call last):\n" in summary
    assert 'raise ValueError("shard 3 of the data is empty")\n    ValueError: shard 3 of the data is empty\n  then\n    rank 0 ' in summary


def test_ranks_that_ignore_sigterm_are_killed_after_the_grace(leak_check: LeakCheck, tmp_path: Path) -> None:
    fails = f"until [ -e {tmp_path}/ready ]; do sleep 0.01; done; exit 7"
    ignores = f"trap '' TERM; touch {tmp_path}/ready; sleep 600"
    shell = f'if [ "$RANK" = 1 ]; then {fails}; else {ignores}; fi'
    started = time.monotonic()
    done = run("-n", "2", "--abort-grace", "0.5", "--no-python", "sh", "-c", shell)
    assert done.returncode == 7
    assert "rank 0 was ended by zspmd-run (SIGKILL)" in done.stderr
    assert time.monotonic() - started > 0.5


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=["INT", "TERM", "HUP"]
)
def test_a_first_signal_is_handed_on_and_ranks_may_end_in_peace(leak_check: LeakCheck, number: signal.Signals, code: int) -> None:
    with begin("-n", "2", script("stubborn"), "child", number.name, num_ready=2) as process:
        process.send_signal(number)
        told, errors = process.communicate(timeout=20)
    assert process.returncode == code
    assert sorted(told.splitlines()) == [f"[rank 0] got {number.name}", f"[rank 1] got {number.name}"]
    assert f"[zspmd] {number.name}: the ranks have 30 s to end" in errors
    assert "FAILED" not in errors


def test_a_second_signal_ends_ranks_that_only_listen_to_sigterm(leak_check: LeakCheck) -> None:
    with begin("-n", "2", script("stubborn"), "SIGTERM", num_ready=2) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGINT)
        assert sorted(process.stdout.readline() for _ in range(2)) == ["[rank 0] got SIGINT\n", "[rank 1] got SIGINT\n"]
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert sorted(told.splitlines()) == ["[rank 0] got SIGTERM", "[rank 1] got SIGTERM"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_that_ignore_everything_are_killed_all_the_same(leak_check: LeakCheck, count: int) -> None:
    with begin("-n", "2", "--grace", "0.3" if count == 1 else "30", script("stubborn"), "child", num_ready=2) as process:
        assert process.stdout is not None
        for name in ("SIGINT", "SIGTERM", "")[:count]:
            process.send_signal(signal.SIGINT)
            if name:
                assert sorted(process.stdout.readline() for _ in range(2)) == [f"[rank 0] got {name}\n", f"[rank 1] got {name}\n"]
        process.communicate(timeout=20)
    assert process.returncode == 130
    assert leak_check.processes() == {}


SLOW_PROGRAM = """
import asyncio, os, sys
import uvloop
from zspmd import ParallelConfig
from zspmd.runtime.launch.agent_protocol import RankLog, RankStart, Start
from zspmd.runtime.launch.command.options import LaunchOptions
from zspmd.runtime.launch.command.running import run_program
from zspmd.runtime.launch.supervisor import NodeSupervisor

def show(event):
    if isinstance(event, RankLog):
        print(*event.lines, sep="\\n", flush=True)

async def program():
    node = NodeSupervisor(show)
    node.open()
    await node.start(Start((RankStart(0, dict(os.environ)),), "spawn", argv=tuple(sys.argv[1:])))
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.shield(node.stop(100.0, 2.0))
    return 0

options = LaunchOptions(ParallelConfig(), "unused", ("cpu",), None, is_quiet=True)
sys.exit(uvloop.run(run_program(program(), options)))
"""


@pytest.mark.parametrize("count", [2, 3])
def test_a_program_that_drains_for_too_long_has_its_ranks_ended_by_more_signals(leak_check: LeakCheck, count: int) -> None:
    argv = [sys.executable, "-c", SLOW_PROGRAM, sys.executable, script("stubborn")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("zspmd-run: SIGINT: ending; ")
        process.send_signal(signal.SIGINT)
        told = process.stdout.readline()
        assert told == "got SIGTERM\n", process.stderr.read()
        if count == 3:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "zspmd-run: ended by SIGINT\n"
    assert leak_check.processes() == {}


def test_the_death_of_zspmd_run_leaves_nothing(leak_check: LeakCheck) -> None:
    with begin("-n", "2", script("stubborn"), "child", num_ready=2) as process:
        assert len(leak_check.processes()) >= 7  # itself, guard, agent, two ranks and a child of each
        process.kill()
        process.communicate(timeout=20)
        leak_check.wait_gone()


def only_child(pid: int) -> int:
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


@pytest.mark.parametrize(("victim", "name"), [("guard", "the guard of this node's agent"), ("agent", "the agent of this node")])
def test_the_death_of_the_agent_or_its_guard_is_named(leak_check: LeakCheck, victim: str, name: str) -> None:
    with begin("-n", "2", script("stubborn"), num_ready=2) as process:
        guard = only_child(process.pid)
        pid = guard if victim == "guard" else only_child(guard)
        os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 121
    words = f"zspmd-run: the agent that supervises the ranks is gone: {name}, pid {pid}, was ended by SIGKILL"
    assert words in errors


@pytest.mark.parametrize("victim", ["guard", "agent"])
def test_the_death_of_the_agent_leaves_nothing_that_ranks_have_started(leak_check: LeakCheck, victim: str) -> None:
    escapes = "setsid sh -c 'sleep 600 & sleep 600' & echo ready; sleep 600"
    with begin("-n", "2", "--no-python", "sh", "-c", escapes, num_ready=2) as process:
        guard = only_child(process.pid)
        os.kill(guard if victim == "guard" else only_child(guard), signal.SIGKILL)
        process.communicate(timeout=20)
        assert process.returncode == 121
        assert leak_check.processes() == {}


def test_what_the_shell_had_started_before_outlives_the_agent(leak_check: LeakCheck) -> None:
    """``exec`` hands its background jobs over as children, and they are not the launch's."""
    command = shlex.join([*RUN, "--no-python", "sh", "-c", "kill -KILL $PPID"])
    with subprocess.Popen(["sh", "-c", f"sleep 600 & echo $!; exec {command}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        sleeper = int(process.stdout.readline())
        assert process.wait(20) == 121
        assert list(leak_check.processes()) == [sleeper]
        os.kill(sleeper, signal.SIGKILL)


def test_nobody_reads_the_output(leak_check: LeakCheck) -> None:
    with begin("--no-python", "sh", "-c", "echo ready; trap exit TERM; while :; do echo more; sleep 0.01; done", num_ready=1) as process:
        assert process.stdout is not None
        process.stdout.close()
        block_until(lambda: process.poll() is not None, 20)
        assert process.stderr is not None
        assert "nobody reads" in process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("arguments", [["doctor"], ["--dry-run", "--no-python", "true"]], ids=["program", "plan"])
def test_nobody_reads_what_zspmd_run_itself_prints(leak_check: LeakCheck, arguments: list[str]) -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    done = subprocess.run([*RUN, *arguments], stdout=write_fd, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    os.close(write_fd)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_full_disk_below_the_output_is_told_and_ends_nothing(leak_check: LeakCheck) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*RUN, "--no-python", "echo", "lost"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=30, check=False
        )
    assert done.returncode == 0
    assert "[zspmd] standard output takes no more: [Errno 28] No space left on device; the launch goes on" in done.stderr


def test_a_launch_under_nohup_outlives_its_terminal(leak_check: LeakCheck) -> None:
    argv = ["nohup", *RUN, script("stubborn"), "SIGTERM"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=20)
    assert (process.returncode, told) == (143, "got SIGTERM\n")


def test_a_pager_may_read_the_rest_later_and_a_signal_ends_the_wait_for_it(leak_check: LeakCheck) -> None:
    size = 500_000
    with begin("--no-python", "sh", "-c", f"echo ready; seq {size}", num_ready=1) as process:
        block_until(lambda: not leak_check.run_directories(), 20)  # the launch is over
        assert process.poll() is None
        told, _ = process.communicate(timeout=20)
        assert told.splitlines() == [str(number) for number in range(1, size + 1)]
    assert process.returncode == 0
    with begin("--no-python", "sh", "-c", f"echo ready; seq {size}", num_ready=1) as process:
        block_until(lambda: not leak_check.run_directories(), 20)
        process.send_signal(signal.SIGINT)
        block_until(lambda: process.poll() is not None, 20)
    assert process.returncode == 130


def test_a_reader_that_pauses_does_not_keep_a_signal_from_ending_the_launch(leak_check: LeakCheck) -> None:
    endless = "echo ready; yes 0123456789"
    with begin("--no-python", "sh", "-c", endless, num_ready=1) as process:
        process.send_signal(signal.SIGINT)
        block_until(lambda: process.poll() is not None, 20)
    assert process.returncode == 130


@pytest.mark.parametrize(("command", "code"), [("no-such-command", 127), ("/etc/passwd", 126)], ids=["not found", "not executable"])
def test_a_command_that_cannot_be_executed(leak_check: LeakCheck, command: str, code: int) -> None:
    done = run("--no-python", command)
    assert done.returncode == code
    assert f"cannot execute '{command}'" in done.stderr
