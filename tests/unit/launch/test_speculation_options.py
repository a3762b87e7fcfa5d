"""``--speculate`` of ``zspmd-run generate``, up to the point where processes start."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from zspmd.errors import ConfigError
from zspmd.runtime.engine.checkpoint import DEMO_MODEL
from zspmd.runtime.launch.cli import main
from zspmd.runtime.launch.command.speculation_options import add_speculation_arguments, read_speculation
from zspmd.speculation_config import DraftConfig, NgramConfig, SpeculationConfig


def read(*arguments: str) -> SpeculationConfig | None:
    parser = argparse.ArgumentParser()
    add_speculation_arguments(parser)
    return read_speculation(parser.parse_args(arguments))


def test_the_options_are_a_config() -> None:
    assert read() is None
    assert read("--speculate", "ngram:k=2") == SpeculationConfig(NgramConfig(k=2), "goodput", (), "match")
    given = read("--speculate", "draft:a,k=6", "--speculate-policy", "batch:1-4=6", "--speculate-verify", "rejection")
    assert given == SpeculationConfig(DraftConfig("a", k=6), "batch", ((4, 6),), "rejection")


@pytest.mark.parametrize("option", [("--speculate-policy", "fixed"), ("--speculate-verify", "match")], ids=["policy", "verify"])
def test_how_without_who_is_refused(option: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{option[0]} is '{option[1]}', and nothing proposes tokens; give --speculate too"):
        read(*option)


@pytest.mark.parametrize(
    ("launch", "arguments", "words"),
    [
        pytest.param([], ["--speculate", "ngrams"], "speculation 'ngrams', in 'ngrams': that is no proposer", id="proposer"),
        pytest.param([], ["--speculate", "ngram", "--speculate-policy", "best"], "policies are goodput, fixed and batch", id="policy"),
        pytest.param([], ["--speculate-policy", "fixed"], "nothing proposes tokens; give --speculate too", id="policy alone"),
        pytest.param(["--tp", "4"], ["--speculate", "draft:demo,tp=2"], "choose 1 or 4", id="tp"),
        pytest.param([], ["--speculate", "draft:/nowhere"], "no model directory /nowhere", id="no draft"),
    ],
)
def test_a_wrong_option_ends_with_2_before_a_process_starts(
    launch: list[str], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*launch, "generate", *arguments, "1+1="]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert "starting" not in printed.err
    assert not printed.out


def test_a_draft_of_another_vocabulary_ends_with_2_before_a_process_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = shutil.copytree(DEMO_MODEL / "draft", tmp_path / "draft")
    tokenizer = json.loads((draft / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["+"], vocabulary["="] = vocabulary["="], vocabulary["+"]
    (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["generate", "--speculate", f"draft:{draft}", "1+1="]) == 2
    told = capsys.readouterr().err
    assert f"{draft}/tokenizer.json has another vocabulary than {DEMO_MODEL}/tokenizer.json: " in told
    assert f"'+' has id {vocabulary['+']} there and id {vocabulary['=']} here" in told


@pytest.mark.parametrize(
    ("proposer", "sizes"),
    [
        pytest.param("ngram", None, id="no draft"),
        pytest.param("draft:demo,tp=2", ["395,008"] * 4, id="shared"),
        pytest.param("draft:demo", ["788,224"] * 4, id="whole"),
        pytest.param("draft:demo,tp=2+draft:demo,k=1+ngram", ["1,183,232"] * 4, id="two"),
    ],
)
def test_a_dry_run_shows_what_drafts_add_to_each_rank(proposer: str, sizes: list[str] | None, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--tp", "2", "--pp", "2", "--devices", "cpu", "--dry-run"]
    assert main([*layout, "generate", "--speculate", proposer]) == 0
    rows = [line.split() for line in capsys.readouterr().out.partition("\nholds    ")[2].splitlines()]
    assert " ".join(rows[0]).endswith(" rows weights bytes" if sizes is None else " rows weights bytes draft bytes")
    assert sizes is None or [row[-1] for row in rows[1:]] == sizes
    assert main([*layout, "--json", "generate", "--speculate", proposer]) == 0
    shares = json.loads(capsys.readouterr().out)["shares"]
    assert [f"{share['draft_bytes']:,}" for share in shares if "draft_bytes" in share] == (sizes or [])
