"""Scripts under ``zspmd-run``, as people have them for torchrun: what they are given, what is shown of them, where it is kept."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.leaks import LeakCheck
from support.polling import block_until
from support.script_runs import RUN, SCRIPTS, begin, run, script
from support.torch_exits import run_to_its_end

from zspmd.runtime.launch.ports import FIRST_PORT, LAST_PORT, first_candidate


def facts(*arguments: str, cwd: Path | None = None) -> list[dict[str, Any]]:
    """Run with ``--no-prefix`` and return what each rank said of itself, in rank order."""
    done = run("--no-prefix", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return sorted(map(json.loads, done.stdout.splitlines()), key=lambda told: int(told["environment"]["RANK"]))


def test_a_script_finds_itself_as_under_python(leak_check: LeakCheck, tmp_path: Path) -> None:
    told = facts("-n", "2", script("facts"), "--", "-x", "--flag", cwd=tmp_path)
    assert [rank["argv"] for rank in told] == [[script("facts"), "--", "-x", "--flag"]] * 2
    assert {(rank["path0"], rank["name"], rank["cwd"], rank["stdin"]) for rank in told} == {(str(SCRIPTS), "__main__", str(tmp_path), "")}


def test_a_module_is_found_from_the_working_directory(leak_check: LeakCheck) -> None:
    (told,) = facts("-m", "scripts.facts", "one", cwd=SCRIPTS.parent)
    assert (told["argv"], told["name"], told["path0"]) == ([script("facts"), "one"], "__main__", str(SCRIPTS.parent))


def test_a_command_is_executed_as_it_is(leak_check: LeakCheck) -> None:
    done = run("-n", "2", "--no-python", "sh", "-c", 'echo "$RANK of $WORLD_SIZE"')
    assert sorted(done.stdout.splitlines()) == ["[rank 0] 0 of 2", "[rank 1] 1 of 2"]


def test_the_environment_is_that_of_torch_programs(leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("COPIED", "copy")
    options = ["-n", "2", "--rdzv-id", "job 7", "--env", "GIVEN=a=b", "-x", "COPIED", "-x", "SLURM_PROCID"]
    names = ["TORCHELASTIC_USE_AGENT_STORE", "SLURM_PROCID", "COPIED", "GIVEN", "PYTHONUNBUFFERED"]
    environments = [told["environment"] for told in facts(*options, script("facts"), *names)]
    for rank, environment in enumerate(environments):
        assert [environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == [str(rank)] * 2 + ["2", "2"]
        assert [environment[name] for name in names] == [None, "5", "copy", "a=b", "1"]
        assert environment["TORCHELASTIC_RUN_ID"] == "job 7"
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert FIRST_PORT <= int(environment["MASTER_PORT"]) <= LAST_PORT
        assert 1 <= int(environment["OMP_NUM_THREADS"]) <= max(1, (os.cpu_count() or 1) // 2)
    assert environments[0]["MASTER_PORT"] == environments[1]["MASTER_PORT"]


def test_init_process_group_meets_over_the_held_port_in_two_launches_at_once(leak_check: LeakCheck) -> None:
    processes = [begin("-n", "2", "--no-prefix", script("meet")) for _ in range(2)]
    ports = []
    for process in processes:
        told, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        (line, other) = told.splitlines()
        assert line == other
        assert line.split()[0] == "3"
        ports.append(line.split()[1])
    assert ports[0] != ports[1]


@pytest.mark.long  # what docs/examples print is compared so too
def test_a_training_gives_the_losses_that_it_gives_under_torchrun(leak_check: LeakCheck) -> None:
    ours = run("--standalone", "--nproc_per_node=2", "--no-prefix", script("ddp"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script("ddp")]
    theirs = run_to_its_end(torchrun, timeout=60)
    losses = [float.fromhex(line) for line in ours.stdout.splitlines()]
    assert (ours.returncode, theirs.returncode) == (0, 0), ours.stderr + theirs.stderr
    assert losses == [float.fromhex(line) for line in theirs.stdout.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0]


def test_the_coordinator_works_in_a_script(leak_check: LeakCheck) -> None:
    done = run("-n", "2", "--launch-id", "scripts", "--no-prefix", script("coordinate"))
    assert done.stdout.splitlines() == ["scripts from 0 0,1"] * 2, done.stderr


def test_one_rank_has_no_prefix_and_streams_stay_apart(leak_check: LeakCheck) -> None:
    done = run(script("talk"))
    assert done.stdout == "out 0\n\N{REPLACEMENT CHARACTER}\ndone\nlast\n"
    assert done.stderr == "err 0\n"


def test_a_progress_bar_is_shown_while_it_goes_on(leak_check: LeakCheck) -> None:
    with begin("--no-python", "sh", "-c", r"printf '\r 10%%\r 20%%'; sleep 600") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == " 10%\n"
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=20)
    assert told == " 20%\n"


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=["stdin", "stdout", "stderr", "all"])
def test_standard_streams_may_be_closed(leak_check: LeakCheck, tmp_path: Path, closed: tuple[int, ...]) -> None:
    redirections = " ".join(f"{fd}{'<' if fd == 0 else '>'}&-" for fd in closed)
    command = shlex.join([*RUN, "--no-python", "sh", "-c", f"echo out; touch {tmp_path}/ran"])
    done = subprocess.run(["sh", "-c", f"exec {command} {redirections}"], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "" if 1 in closed else "out\n", "")
    assert (tmp_path / "ran").exists()


def test_seventy_thousand_arguments_arrive(leak_check: LeakCheck) -> None:
    done = run("--no-python", "sh", "-c", 'echo "$#"', "sh", *["a"] * 70_000)
    assert (done.stdout, done.stderr) == ("70000\n", "")


def test_a_log_dir_that_cannot_be_is_told_before_anything_starts(leak_check: LeakCheck, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("--log-dir", str(tmp_path / "file"), "--no-python", "touch", str(tmp_path / "started"))
    assert done.returncode == 2
    assert f"--log-dir '{tmp_path}/file' cannot be written" in done.stderr
    assert not (tmp_path / "started").exists()


def test_a_reader_that_pauses_for_long_has_the_rank_wait_and_loses_no_line(leak_check: LeakCheck, tmp_path: Path) -> None:
    size, log = 100_000_000, tmp_path / "r00000.out"
    sizes = [-1]

    def is_paused_or_done() -> bool:
        sizes.append(log.stat().st_size if log.exists() else -1)
        return sizes[-1] == size or (sizes[-1] > 0 and len(sizes) > 100 and sizes[-1] == sizes[-100])

    with begin("--log-dir", str(tmp_path), "--no-python", "sh", "-c", f"yes {'0123456789' * 10} | head -c {size}") as process:
        assert process.stdout is not None
        block_until(is_paused_or_done, 30)
        num_bytes = sum(map(len, process.stdout))
        assert process.wait(30) == 0
    assert num_bytes == size + 1  # the last line is cut, and gets an end


SHOWN = {"out": ["[rank 0] out 0", "[rank 1] out 1"], "err": ["[rank 0] err 0", "[rank 1] err 1"]}
RAW = b"\xff\n 10%\r 90%\rdone\nlast"


@pytest.mark.parametrize(
    ("options", "out", "err"),
    [
        ([], SHOWN["out"], SHOWN["err"]),
        (["--redirects", "1"], [], SHOWN["err"]),
        (["-r", "3"], [], []),
        (["--redirect", "3", "--tee", "0:1,1:2"], SHOWN["out"][:1], SHOWN["err"][1:]),
        (["-t", "3"], SHOWN["out"], SHOWN["err"]),
        (["--local_ranks_filter", "1"], SHOWN["out"][1:], SHOWN["err"][1:]),
    ],
    ids=["log-dir alone", "redirects stdout", "redirects both", "tee wins", "tee", "filter"],
)
def test_what_is_shown_and_what_is_in_the_files(
    leak_check: LeakCheck, tmp_path: Path, options: list[str], out: list[str], err: list[str]
) -> None:
    done = run("-n", "2", "--log-dir", str(tmp_path / "logs"), *options, script("talk"))
    assert done.returncode == 0
    assert sorted(line for line in done.stdout.splitlines() if "out" in line) == out
    assert sorted(line for line in done.stderr.splitlines() if "err" in line) == err
    files = {path.name: path.read_bytes() for path in (tmp_path / "logs").iterdir()}
    expected = {f"r0000{rank}.out": f"out {rank}\n".encode() + RAW for rank in range(2)}
    assert files == {**expected, **{f"r0000{rank}.err": f"err {rank}\n".encode() for rank in range(2)}}


@pytest.mark.parametrize("options", [["--tee", "3"], []], ids=["tee", "nothing"])
def test_log_files_are_kept_without_being_asked_for(
    leak_check: LeakCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    done = run("--launch-id", "kept", *options, script("talk"))
    directory = tmp_path / "zspmd" / "kept"
    assert (f"[zspmd] log files are in {directory}\n" in done.stderr) == bool(options)
    assert (directory / "r00000.err").read_text() == "err 0\n"
    assert (tmp_path / "zspmd" / "latest").resolve() == directory


def test_a_launch_whose_log_files_have_no_place_says_so_and_runs(
    leak_check: LeakCheck, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    done = run(script("talk"))
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "out 0")
    assert re.search(r"\[zspmd\] no log files are kept: .*Not a directory.*; --log-dir says where\n", done.stderr)


def test_options_of_torchrun_that_mean_nothing_here_are_named(leak_check: LeakCheck) -> None:
    done = run("--rdzv_backend=c10d", "--rdzv-endpoint", "localhost:0", "--nnodes", "1:1", "--max-restarts=0", script("talk"))
    assert done.returncode == 0
    assert "[zspmd] ignored, since it means nothing here: --rdzv-backend, --rdzv-endpoint\n" in done.stderr


@pytest.mark.parametrize("count", [6, pytest.param(16, marks=pytest.mark.long)])
def test_launches_at_once_share_no_port(leak_check: LeakCheck, tmp_path: Path, count: int) -> None:
    """Their ids have the same first candidate, so that each must pass over the others' ports."""
    wanted = first_candidate("base-0", "master")
    ids = [name for name in (f"base-{index}" for index in range(400_000)) if first_candidate(name, "master") == wanted][:count]
    processes = [begin("--launch-id", name, script("listen"), str(tmp_path), str(count)) for name in ids]
    for process in processes:
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
    ports = [int((tmp_path / name).read_text()) for name in ids]
    assert len(set(ports)) == count


def test_a_port_that_is_asked_for_is_used_and_held(leak_check: LeakCheck, tmp_path: Path) -> None:
    port = str(first_candidate("asked", "for"))
    with begin("--master-port", port, "--launch-id", "first", script("listen"), str(tmp_path), "2") as first:
        block_until((tmp_path / "first").exists, 20)
        second = run("--master_port", port, script("facts"))
        assert second.returncode == 120
        assert f"port {port} of 127.0.0.1 is taken" in second.stderr
        assert (tmp_path / "first").read_text() == port
        (tmp_path / "second").touch()
        first.communicate(timeout=20)
    assert first.returncode == 0


def test_of_two_launches_with_one_id_one_wins(leak_check: LeakCheck, tmp_path: Path) -> None:
    processes = [begin("--launch-id", "same", script("listen"), str(tmp_path), "2") for _ in range(2)]
    block_until(lambda: any(process.poll() is not None for process in processes), 20)
    loser, winner = sorted(processes, key=lambda process: process.poll() is None)
    _, errors = loser.communicate()
    assert loser.returncode == 120
    assert f"launch id 'same' is held by pid {winner.pid}" in errors
    (tmp_path / "go").touch()
    winner.communicate(timeout=20)
    assert winner.returncode == 0
