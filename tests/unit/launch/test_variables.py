"""Variables for all ranks: from the command line, by name and pattern, and from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from zspmd.errors import ConfigError
from zspmd.runtime.launch.command.host_options import forwarded_names
from zspmd.runtime.launch.command.variables import read_env_files, read_variables

HERE = {
    "WANDB_MODE": "off",
    "WANDB_KEY": "k",
    "HOME": "/h",
    "RANK": "3",
    "SLURM_PROCID": "1",
    "SLURM_JOB_ID": "7",
    "TORCHELASTIC_RUN_ID": "x",
}


@pytest.mark.parametrize(
    ("entries", "variables"),
    [
        (["A=1", "B=", "A=2=3"], {"A": "2=3", "B": ""}),
        (["HOME", "SLURM_PROCID"], {"HOME": "/h", "SLURM_PROCID": "1"}),
        (["WANDB_*"], {"WANDB_MODE": "off", "WANDB_KEY": "k"}),
        (["WANDB_[K]?Y"], {"WANDB_KEY": "k"}),
        (["WANDB_*", "WANDB_MODE=on"], {"WANDB_MODE": "on", "WANDB_KEY": "k"}),
        (["A=*"], {"A": "*"}),
        (["SLURM_*"], {"SLURM_JOB_ID": "7"}),
    ],
    ids=["values", "copies", "pattern", "pattern of characters", "value above pattern", "star as a value", "no other launcher's facts"],
)
def test_variables_of_the_command_line(entries: list[str], variables: dict[str, str]) -> None:
    assert read_variables(entries, HERE) == variables


@pytest.mark.parametrize(
    ("entry", "words"),
    [("ABSENT_*", "'ABSENT_\\*' fits no variable that is set here"), ("RAN?", "fits no variable"), ("*=1", None)],
    ids=["nothing fits", "a fact of the launch", "a star in a name"],
)
def test_a_pattern_that_fits_nothing(entry: str, words: str | None) -> None:
    if words is None:
        assert read_variables([entry], HERE) == {"*": "1"}
        return
    with pytest.raises(ConfigError, match=words):
        read_variables([entry], HERE)


def test_patterns_travel_as_they_are_and_names_without_values() -> None:
    assert forwarded_names(["WANDB_*", "A=1"], {"WANDB_MODE": "off", "A": "1"}) == ["WANDB_*", "WANDB_MODE", "A"]


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("A=1\n\n# no\n  B = two words \nexport C=3", {"A": "1", "B": "two words", "C": "3"}),
        ("\ufeffA=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
        ("A='a # b' # c\nB=\"x # y\"", {"A": "a # b", "B": "x # y"}),
        ("A=a#b\nB=a # b\nC=# b\nD=", {"A": "a#b", "B": "a", "C": "", "D": ""}),
        (r'A="a\nb\t\"c\" \\ \$HOME \q"', {"A": 'a\nb\t"c" \\ $HOME \\q'}),
        (r"A='\n$HOME'", {"A": r"\n$HOME"}),
        ("A=$HOME", {"A": "$HOME"}),
        ("A=1\nA=2", {"A": "2"}),
        ("", {}),
    ],
    ids=["plain", "of Windows", "quotes", "comments", "escapes", "none in single quotes", "nothing is expanded", "the last wins", "empty"],
)
def test_variables_of_a_file(tmp_path: Path, text: str, variables: dict[str, str]) -> None:
    (tmp_path / "env").write_text(text, newline="")
    assert read_env_files([str(tmp_path / "env")]) == variables


def test_every_bad_line_of_a_file_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "env"
    path.write_text("A\n1B=2\nC='open\nD='x' y\nRANK=1\nE=1\n")
    with pytest.raises(ConfigError) as told:
        read_env_files([str(path)])
    lines = str(told.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [f"{path}:{number}" for number in (1, 2, 3, 4, 5)]
    words = ("sets no variable", "sets no variable", "no closing '", "something follows", "RANK: the launch itself")
    assert all(word in line for word, line in zip(words, lines, strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"A=\xff", "is not UTF-8 at byte 2"),
        (b"#" * ((1 << 20) + 1), "is larger than 1048576 bytes"),
    ],
    ids=["absent", "binary", "too large"],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "env").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_env_files([str(tmp_path / "env")])


def test_the_later_file_goes_above_the_earlier(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("A=1\nB=1")
    (tmp_path / "b").write_text("B=2")
    assert read_env_files([str(tmp_path / "a"), str(tmp_path / "b")]) == {"A": "1", "B": "2"}
