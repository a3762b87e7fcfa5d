"""``zspmd-run bench engine`` and ``bench start`` from the shell's side, with tiny numbers; and the timings of a start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.leaks import LeakCheck

RUN = [sys.executable, "-m", "zspmd.runtime.launch.cli"]
TINY = ("--preset", "tiny", "--turns", "1")


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Run a benchmark on the tiny model and return its JSON."""
    path = tmp_path / "out.json"
    argv = [*RUN, "-q", "--devices", "cpu", "bench", *arguments, *TINY, "--json", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    told: dict[str, Any] = json.loads(path.read_text())
    return told


def sides(told: dict[str, Any], **case: object) -> list[str]:
    return [row["side"] for row in told["rows"] if case.items() <= row["case"].items()]


def test_an_engine_takes_turns_with_a_bare_loop_and_both_have_the_same_tokens(leak_check: LeakCheck, tmp_path: Path) -> None:
    told = bench(tmp_path, "engine", "--tp", "2", "--batch", "2", "--prompt-tokens", "5", "--output-tokens", "20")
    assert sides(told, tp=2, batch=2, what="decode") == ["zspmd", "bare loop"]
    assert sides(told, tp=2, batch=2, what="between tokens") == ["zspmd", "bare loop"]
    decode = next(row for row in told["rows"] if row["case"]["what"] == "decode")
    assert decode["unit"] == "tokens/s"
    assert 0 <= decode["facts"]["rank idle %"] < 100
    notes = " ".join(told["notes"])
    assert "times as fast as bare loop" in notes
    assert "other tokens" not in notes


def test_prompts_that_come_one_by_one(leak_check: LeakCheck, tmp_path: Path) -> None:
    told = bench(tmp_path, "engine", "--rate", "200", "--requests", "6", "--prompt-tokens", "5", "--output-tokens", "4")
    rows = {row["case"]["what"]: row["samples"] for row in told["rows"] if "prompts/s" in row["case"]}
    assert rows == {"first token": 6, "each token": 6, "between tokens": 18}


def test_a_start_has_its_phases_in_order(leak_check: LeakCheck, tmp_path: Path) -> None:
    told = bench(tmp_path, "start", "--ranks", "2")
    phases = {row["case"]["until"]: row["median"] for row in told["rows"] if row["case"]["of"] == "engine"}
    names = ["checkpoint and tokenizer read", "agent serves", "forked", "connected", "ranks ready", "KV pool made", "first token"]
    assert set(names) <= phases.keys()
    assert sorted(names, key=lambda name: phases[name]) == names
    assert sides(told, of="empty", until="ranks ready") == sides(told, of="program", until="first text") == ["zspmd"]


def test_timings_tell_a_start_from_the_beginning_of_the_process(leak_check: LeakCheck) -> None:
    argv = [*RUN, "--tp", "2", "generate", "123+456=", "--timings"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "123+456=579\n")
    told = re.findall(r"^\[zspmd\] +(\d+\.\d\d) s +\+\d+\.\d\d  (.+)$", done.stderr, re.MULTILINE)
    assert [float(at) for at, _ in told] == sorted(float(at) for at, _ in told)
    assert told[0][1] == "engine starts"
    assert told[-1][1] == "first token"
    assert any(re.fullmatch("2 ranks, the last [01]: weights read", what) for _, what in told)
