"""Launches as seen from outside: listed, read and stopped by their ids, and reported when they have ended."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.leaks import LeakCheck
from support.polling import block_until
from support.script_runs import begin, run, script

EMBEDDED = """
import asyncio, zspmd

async def main():
    async with zspmd.launch("support.workers:Echo", world_size=2, launch_id="embedded", preload=()) as group:
        await group.step(1)
        print("ready", flush=True)
        while True:
            await group.step(1)
            await asyncio.sleep(0.01)

try:
    asyncio.run(main())
except zspmd.WorkerExitedError as error:
    print(error, flush=True)
"""


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "zspmd"


def listed() -> list[dict[str, Any]]:
    launches: list[dict[str, Any]] = json.loads(run("ps", "--json").stdout)
    return launches


def report(state: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((state / "latest" / "report.json").read_text())
    return told


def test_a_script_is_listed_read_and_stopped(leak_check: LeakCheck, state: Path) -> None:
    with begin("-n", "2", "--launch-id", "one", "--no-python", "sh", "-c", "echo ready; exec sleep 600", num_ready=2) as process:
        (told,) = listed()
        assert (told["launch_id"], told["kind"], told["pid"], told["has_driver"]) == ("one", "script", process.pid, True)
        (node,) = told["nodes"]
        assert {rank["pid"] for rank in node["ranks"]} <= set(leak_check.processes())
        assert run("logs", "o", "--rank", "1", "--stream", "out").stdout == "ready\n"
        begun = time.monotonic()
        assert run("stop", "one").stdout.startswith("launch one has ended after ")
        assert time.monotonic() - begun < 10
        process.communicate(timeout=20)
    assert process.returncode == 143
    assert listed() == []
    assert report(state)["cause"] == {"kind": "stopped", "signal": "SIGTERM"}
    assert run("logs", "latest", "--stream", "out").stdout == "[rank 0] ready\n[rank 1] ready\n"


def test_by_force_ranks_that_ignore_everything_end_at_once(leak_check: LeakCheck) -> None:
    with begin("-n", "2", "--launch-id", "one", script("stubborn"), "child", num_ready=2) as process:
        begun = time.monotonic()
        assert run("stop", "one", "--now").stdout.startswith("launch one has ended after ")
        assert time.monotonic() - begun < 10
        process.communicate(timeout=20)
    assert process.returncode == 143
    assert leak_check.processes() == {}


@pytest.mark.parametrize("options", [[], ["--now"]], ids=["gently", "now"])
def test_a_program_of_ones_own_gets_the_error_of_ranks_that_are_gone(leak_check: LeakCheck, options: list[str]) -> None:
    tests = str(Path(__file__).parents[1])
    program = f"import sys; sys.path.insert(0, {tests!r})\n{EMBEDDED}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        block_until(lambda: [told["kind"] for told in listed()] == ["embedded"], 20)
        assert run("stop", "embedded", *options).stdout.startswith("launch embedded has ended after ")
        told, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert re.search("was ended by SIG(TERM|KILL)", told)
    assert leak_check.processes() == {}


def test_a_failure_is_reported(leak_check: LeakCheck, state: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    done = run("-n", "2", "--report", str(path), "--no-python", "sh", "-c", "test $RANK = 0 && exec sleep 600; echo words; exit 7")
    assert done.returncode == 7
    assert f"  logs         {state / 'latest'}".replace("latest", "") in done.stderr
    told = json.loads(path.read_text())
    assert (told["exit_code"], told["cause"]["kind"], told["cause"]["rank"], told["cause"]["reason"]) == (7, "rank_exit", 1, "words")
    assert [(end["rank"], end["exit_code"]) for end in told["ranks"]] == [(1, 7), (0, -15)]


def test_a_launch_that_takes_too_long_says_where_its_ranks_are(leak_check: LeakCheck, state: Path) -> None:
    begun = time.monotonic()
    done = run("--timeout", "1", "--no-python", "sleep", "600")
    assert done.returncode == 124
    assert 1 <= time.monotonic() - begun < 15
    assert "[zspmd] not done within 1 s (--timeout); what the ranks are doing:\n[zspmd] rank 0: the kernel says: sleeping" in done.stderr
    assert report(state)["cause"] == {"kind": "timeout", "timeout_s": 1.0}


def test_a_launch_that_could_not_be_started_is_reported(leak_check: LeakCheck, state: Path) -> None:
    done = run("--host", "no.such.host.invalid", "--rsh", "false", "-n", "1", "--no-python", "true")
    assert done.returncode == 120
    assert "no.such.host.invalid" in done.stderr
    assert (report(state)["exit_code"], report(state)["cause"]["kind"]) == (120, "start_failed")
