"""The command line up to the point where processes start: options, plans, messages and exit codes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from zspmd.errors import (
    ConfigError,
    EndpointInUseError,
    PeerLostError,
    ReadyTimeoutError,
    RequestError,
    WorkerExitedError,
    WorkerRaisedError,
    ZspmdError,
)
from zspmd.runtime.engine.checkpoint import DEMO_MODEL
from zspmd.runtime.launch.cli import main
from zspmd.runtime.launch.command.exit_codes import exit_code
from zspmd.runtime.launch.ports import first_candidate


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generat", "x"], "unknown program 'generat'; programs are .*generate.*; did you mean 'generate'"),
        (["generate", "--model", "/nowhere/at/all", "x"], "no model directory /nowhere/at/all; give a local directory"),
        (["generate", "--temperature", "-1", "x"], "temperature is -1.0; it must be a number from 0 to 100"),
        (["generate", "--max-tokens", "0", "x"], "max_tokens is 0; it must be a whole number from 1"),
        (["generate", ""], "a prompt is empty; give at least one character"),
        (["generate", "--max-model-len", "10000", "x"], "max_model_len is 10000; the model in .* has 512 positions: lower it"),
        (["--tp", "3", "generate", "x"], "tp 3 does not fit 4 heads"),
        (["--tp", "0", "generate", "x"], "tp is 0; it must be a whole number of at least 1"),
        (["-n", "2", "--tp", "4", "generate", "x"], "-n 2 and --tp 4 do not agree"),
        (["--tp", "2", "--devices", "cuda:0", "generate", "x"], "devices lists 1 entries .* for 2 ranks"),
        (["--launch-id", "a/b", "generate", "x"], "launch id 'a/b'"),
        (["--pp", "9", "generate", "x"], "pp 9 is more than the 4 layers of the model; choose at most 4"),
        (["--pp", "2", "generate", "--pp-partition", "3,2", "x"], "the pipeline partition 3, 2 has 2 stages and 5 layers; .* 4 in all"),
        (["--pp", "2", "generate", "--pp-partition", "3;1", "x"], "--pp-partition is '3;1'; give the number of layers of each stage"),
        (["--tp", "2", "--ep", "2", "generate", "x"], "ep is 2, and the model has no experts: .* choose 1"),
    ],
    ids=[
        "unknown program",
        "no model",
        "temperature",
        "max_tokens",
        "empty prompt",
        "long context",
        "tp does not divide",
        "tp 0",
        "sizes disagree",
        "too few devices",
        "launch id",
        "more stages than layers",
        "partition of other layers",
        "partition unreadable",
        "no experts",
    ],
)
def test_wrong_input_is_one_message_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zspmd.runtime.launch.cli.uvloop.run", lambda program: pytest.fail("it was started"))
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert re.fullmatch(rf"zspmd-run: .*{words}.*\n", shown.err), shown.err


def test_a_wrong_option_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--bogus", "generate"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --bogus" in capsys.readouterr().err


def test_a_dry_run_shows_ranks_sockets_and_mesh_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main(["--tp", "2", "--launch-id", "plan", "--dry-run", "generate"]) == 0
    shown = capsys.readouterr().out
    assert f"generate: {DEMO_MODEL}" in shown
    assert f"ipc://{tmp_path}/zspmd/plan/step" in shown
    assert "tp: [0, 1]" in shown
    assert len(re.findall(r"^rank     \d +\d +0 +localhost +cpu$", shown, re.MULTILINE)) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_what_each_rank_holds(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--pp", "2", "--dp", "2", "--devices", "cpu", "--dry-run"]
    assert main([*layout, "generate", "--pp-partition", "3,1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.partition("\nholds    ")[2].splitlines()]
    assert " ".join(rows[0]) == "rank replica stage layers heads kv heads experts vocabulary rows weights bytes"
    assert [row[:7] for row in rows[1:]] == [
        ["0", "0", "0", "0-2", "0-3", "0-3", "-"],
        ["1", "0", "1", "3", "0-3", "0-3", "-"],
        ["2", "1", "0", "0-2", "0-3", "0-3", "-"],
        ["3", "1", "1", "3", "0-3", "0-3", "-"],
    ]
    assert main([*layout, "--json", "generate", "--pp-partition", "3,1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parallel"] == {"tp": 1, "pp": 2, "dp": 2, "ep": 1}
    assert [f"{share['weights_bytes']:,}" for share in told["shares"]] == [row[-1] for row in rows[1:]]


def test_a_dry_run_of_a_script_shows_what_its_ranks_would_get(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["-n", "2", "--launch-id", "plan", "--env", "KEY=secret", "--tee", "3", "--dry-run", "train.py", "--lr", "a b"]) == 0
    shown = capsys.readouterr().out
    assert f"script   {sys.executable} -u train.py --lr 'a b'\n" in shown
    assert f"master   127.0.0.1:{first_candidate('plan', 'master')} (first candidate)\n" in shown
    assert "threads  OMP_NUM_THREADS=3\n" in shown
    assert "env      KEY\n" in shown
    assert "secret" not in shown
    assert len(re.findall(r"^rank     \d +\d +0 +localhost +cpu$", shown, re.MULTILINE)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_a_file_that_looks_like_a_program_is_told_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "train").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 2
    assert "unknown program 'train'" in (told := capsys.readouterr().err)
    assert told.endswith("; to run the file of that name write ./train\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkerExitedError(exit_code=7, rank=1), 7),
        (WorkerExitedError(exit_code=-11, rank=1), 139),
        (WorkerExitedError(exit_code=0, rank=1), 1),
        (WorkerRaisedError("no", rank=0), 1),
        (EndpointInUseError("held"), 120),
        (ReadyTimeoutError("late"), 122),
        (PeerLostError("agent"), 121),
        (ConfigError("wrong"), 2),
        (RequestError("wrong"), 2),
    ],
    ids=["own code", "signal", "left early", "raised", "in use", "not ready", "agent lost", "config", "request"],
)
def test_exit_codes_tell_the_first_cause(error: ZspmdError, code: int) -> None:
    assert exit_code(error) == code
