"""``bench engine --speculate`` and ``bench speculation`` from the shell's side, with tiny numbers: what they print, not how fast it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.leaks import LeakCheck

RUN = [sys.executable, "-m", "zspmd.runtime.launch.cli", "-q", "--devices", "cpu", "bench"]
SPECULATING_FACTS = {"steps", "drafting %", "accepted", "by position %", "draft us", "target us"}


def bench(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run a benchmark and return its JSON and its table."""
    path = tmp_path / "out.json"
    argv = [*RUN, *arguments, "--rounds", "1", "--turns", "1", "--threads", "1", "--json", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    told: dict[str, Any] = json.loads(path.read_text())
    return told, done.stdout


def test_a_speculating_engine_takes_turns_with_a_plain_one(leak_check: LeakCheck, tmp_path: Path) -> None:
    argv = (
        "--preset",
        "demo",
        "--speculate",
        "draft:demo,k=2",
        "--speculate-policy",
        "fixed",
        "--batch",
        "2",
        "--prompts",
        "sums",
        "lines",
    )
    told, text = bench(tmp_path, "engine", *argv)
    assert [(row["case"]["prompts"], row["side"], row["unit"]) for row in told["rows"]] == [
        (kind, side, "tokens/s") for kind in ("sums", "lines") for side in ("plain", "speculating")
    ]
    plain, speculating = told["rows"][2:]
    assert set(plain["facts"]) == {"steps"}
    assert set(speculating["facts"]) == SPECULATING_FACTS
    assert speculating["facts"]["steps"] < plain["facts"]["steps"]
    assert 1 < speculating["facts"]["accepted"] <= 3
    assert len(speculating["facts"]["by position %"].split()) == 2
    assert speculating["ratio"]["median"] > 0
    notes = " ".join(told["notes"])
    assert "prompts lines, batch 2" in notes
    assert "times fewer target steps" in notes
    assert "not the same" not in notes
    assert "speculating" in text


def test_policies_are_compared_and_judged(leak_check: LeakCheck, tmp_path: Path) -> None:
    told, _ = bench(tmp_path, "speculation", "--acceptance", "low", "--batch", "2", "--k", "2", "--engines", "2")
    cases = [(row["case"]["acceptance"], row["case"]["batch"], row["side"]) for row in told["rows"]]
    assert cases == [("low", 2, side) for side in ("off", "fixed", "goodput")]
    assert all(len(row["turn_medians"]) == 2 for row in told["rows"]), "a turn of each of two engines"
    assert all(row["facts"]["to better"] > 0 for row in told["rows"] if row["side"] == "goodput")
    assert all(row["facts"]["accepted"] < 1.2 for row in told["rows"] if row["side"] == "fixed")  # the draft is useless
    verdicts = [note for note in told["notes"] if ": met: " in note or ": missed: " in note]
    assert len(verdicts) == 1
    assert "of none" in verdicts[0]
