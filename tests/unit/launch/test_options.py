"""What a command line means for a script: torchrun's spellings, and every one that cannot be honoured."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from zspmd.config import ParallelConfig
from zspmd.errors import ConfigError, TopologyError, ZspmdError
from zspmd.runtime.launch.command import option_values
from zspmd.runtime.launch.command.command_options import ignored_options, is_script, launch_options, script_options, wants_logs
from zspmd.runtime.launch.command.option_parser import build_parser
from zspmd.runtime.launch.command.options import ScriptOptions


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A directory with a script, and a machine with four cores and no GPU."""
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(option_values, "num_cuda_devices", lambda: 0)
    monkeypatch.setattr(option_values, "available_cores", lambda: 4)


def parsed(*arguments: str) -> ScriptOptions:
    return script_options(build_parser(["generate"]).parse_args([*arguments, "train.py"]))


@pytest.mark.parametrize("spelling", ["--nproc-per-node=3", "--nproc_per_node=3", "-n3"])
def test_the_number_of_ranks_in_every_spelling(spelling: str) -> None:
    assert parsed(spelling).world_size == 3


@pytest.mark.parametrize(("text", "gpus", "number"), [("gpu", 2, 2), ("cpu", 2, 4), ("auto", 2, 2), ("auto", 0, 4)])
def test_the_number_of_ranks_by_what_the_machine_has(monkeypatch: pytest.MonkeyPatch, text: str, gpus: int, number: int) -> None:
    monkeypatch.setattr(option_values, "num_cuda_devices", lambda: gpus)
    assert parsed("-n", text).world_size == number


def test_without_a_number_there_is_one_rank_without_a_prefix() -> None:
    plain = parsed()
    assert (plain.world_size, plain.has_prefix, plain.master_port, plain.master_addr) == (1, False, 0, "127.0.0.1")
    assert plain.run_id == plain.launch_id
    assert (plain.grace_s, plain.abort_grace_s) == (30.0, 5.0)


def test_a_command_of_torchrun_is_taken_as_it_is() -> None:
    one_node = ["--standalone", "--nnodes=1", "--node_rank", "0", "--max-restarts=0"]
    rendezvous = ["--rdzv-id", "100", "--rdzv-backend=c10d", "--master_addr", "localhost", "--master_port", "29511"]
    arguments = build_parser([]).parse_args([*one_node, *rendezvous, "train.py", "--lr", "1", "--", "-n", "9"])
    assert ignored_options(arguments) == ["--rdzv-backend"]
    taken = script_options(arguments)
    assert taken.argv == (sys.executable, "-u", "train.py", "--lr", "1", "--", "-n", "9")
    assert (taken.run_id, taken.master_addr, taken.master_port, taken.world_size) == ("100", "127.0.0.1", 29511, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["--nnodes", "2"], ConfigError, "--nnodes is 2, and nobody says which; give --hostfile or --host, or run one command on each"),
        (["--nnodes=1:4"], ConfigError, "--nnodes is '1:4'; zspmd-run starts as many nodes as it is told"),
        (["--nnodes=two"], ConfigError, "--nnodes is 'two'; give a whole number of at least 1"),
        (["--node-rank", "1"], ConfigError, "--node-rank is 1 and --nnodes 1; nodes count from 0 to 0"),
        (["--max-restarts", "3"], ConfigError, "--max-restarts is 3; zspmd-run restarts nothing"),
        (["-n", "0"], TopologyError, "-n is 0; it must be at least 1"),
        (["-n", "many"], TopologyError, "-n is 'many'; give a number, gpu, cpu or auto"),
        (["-n", "gpu"], TopologyError, "this node shows no CUDA device"),
        (["-n", "2", "--nproc-per-node", "3"], TopologyError, "-n 2 and --nproc-per-node 3 do not agree on one node"),
        (["--tp", "2"], ConfigError, "--tp is for programs"),
        (["--pp", "2"], ConfigError, "--pp is for programs"),
        (["--env", "=1"], ConfigError, "'=1' names no variable"),
        (["--env", "ABSENT"], ConfigError, "ABSENT: it is not set here"),
        (["--env", "RANK=1"], ConfigError, "RANK: the launch itself sets"),
        (["--env", "TORCHELASTIC_RUN_ID=1"], ConfigError, "TORCHELASTIC_RUN_ID: the launch itself sets"),
        (["--devices", "cpu", "--env", "CUDA_VISIBLE_DEVICES=1"], ConfigError, "give one of them"),
        (["--redirects", "4"], ConfigError, "--redirects is '4'; streams are 0 none, 1 stdout"),
        (["--redirects", "5:1"], ConfigError, "rank 5 is outside the world of 1"),
        (["--tee", "out"], ConfigError, "--tee is 'out'; write 0, 1, 2 or 3"),
        (["--tee", "0:"], ConfigError, "--tee is '0:'"),
        (["--local-ranks-filter", "1"], ConfigError, "list ranks from 0 to 0"),
        (["--master-port", "70000"], ConfigError, "--master-port is 70000"),
        (["--local-ranks-filter", "\N{SUPERSCRIPT TWO}"], ConfigError, "list ranks from 0 to 0"),
        (["--redirects", "\N{SUPERSCRIPT TWO}"], ConfigError, "write 0, 1, 2 or 3"),
        (["--log-dir", ""], ConfigError, "--log-dir is empty"),
        (["--master-addr", ""], ConfigError, "--master-addr '' has no address"),
        (["--master-addr", "no such host"], ConfigError, "--master-addr 'no such host' has no address"),
        (["--grace", "-1"], ConfigError, "--grace is -1.0 s"),
        (["--timeout", "-1"], ConfigError, "--timeout is -1.0 s"),
        (["--tail", "41"], ConfigError, "--tail is 41; it must be from 0 to 40"),
        (["--console", "some"], ConfigError, "--console is 'some'; write all, failed or none, or list ranks from 0 to 0"),
        (["--console", "0-3"], ConfigError, "--console is '0-3'"),
        (["--report", "absent/report.json"], ConfigError, "--report 'absent/report.json' cannot be written"),
        (["--report", "."], ConfigError, "--report '.' cannot be written"),
        (["--launch-id", "a b"], ConfigError, "launch id 'a b'"),
        (["-m", "--no-python"], ConfigError, "-m and --no-python exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_honoured_is_an_error(arguments: list[str], error: type[ZspmdError], words: str) -> None:
    with pytest.raises(error, match=words.replace("(", r"\(")):
        parsed(*arguments)


@pytest.mark.parametrize(
    ("options_given", "hidden"),
    [
        ([], set()),
        (["-r", "1"], {(0, "out"), (1, "out")}),
        (["-r", "0:3"], {(0, "out"), (0, "err")}),
        (["-r", "3", "-t", "1:1"], {(0, "out"), (0, "err"), (1, "err")}),
        (["--local-ranks-filter", "1"], {(0, "out"), (0, "err")}),
        (["--console", "1"], {(0, "out"), (0, "err")}),
        (["--console", "0-1"], set()),
        (["--console", "failed"], {(rank, stream) for rank in (0, 1) for stream in ("out", "err")}),
        (["--console", "none"], {(rank, stream) for rank in (0, 1) for stream in ("out", "err")}),
    ],
    ids=["nothing", "stdout of all", "both of rank 0", "tee wins", "filter", "console", "console of all", "failed", "none"],
)
def test_streams_that_are_not_shown(options_given: list[str], hidden: set[tuple[int, str]]) -> None:
    assert parsed("-n", "2", *options_given).shown.hidden(2) == hidden


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [(["-t", "3"], True), (["-r", "0:1"], True), (["-t", "0"], False), (["-t", "3", "--log-dir", "d"], False), ([], False)],
    ids=["tee", "redirects", "tee 0", "log-dir", "none"],
)
def test_a_log_dir_is_wanted_where_files_are_and_none_is_named(arguments: list[str], wanted: bool) -> None:
    assert wants_logs(build_parser([]).parse_args([*arguments, "train.py"])) == wanted


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        (["train.py", "a"], (sys.executable, "-u", "train.py", "a")),
        (["-m", "pkg.train", "a"], (sys.executable, "-u", "-m", "pkg.train", "a")),
        (["--no-python", "bash", "-c", "true"], ("bash", "-c", "true")),
        (["./train.py"], (sys.executable, "-u", "./train.py")),
    ],
    ids=["script", "module", "command", "path"],
)
def test_what_the_ranks_execute(command: list[str], argv: tuple[str, ...]) -> None:
    arguments = build_parser([]).parse_args(command)
    assert is_script(arguments)
    assert script_options(arguments).argv == argv


def test_a_bare_name_is_a_program_and_a_missing_script_is_named() -> None:
    assert not is_script(build_parser([]).parse_args(["generate", "x.py"]))
    with pytest.raises(ConfigError, match=r"there is no script 'absent.py' in .*; give its path, -m for a module"):
        script_options(build_parser([]).parse_args(["absent.py"]))


def test_a_directory_is_a_script_where_python_takes_it_for_one(tmp_path: Path) -> None:
    (tmp_path / "package.d").mkdir()
    with pytest.raises(ConfigError, match=r"'./package.d' is a directory without a __main__.py"):
        script_options(build_parser([]).parse_args(["./package.d"]))
    (tmp_path / "package.d" / "__main__.py").touch()
    assert script_options(build_parser([]).parse_args(["./package.d"])).argv[-1] == "./package.d"


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_script_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.py").chmod(0)
    with pytest.raises(ConfigError, match=r"the script 'train.py' cannot be read; its mode is 0"):
        parsed()


@pytest.mark.parametrize("options_given", [["--no-python"], ["-m"]])
def test_an_empty_command(options_given: list[str]) -> None:
    with pytest.raises(ConfigError, match="the command is empty"):
        script_options(build_parser([]).parse_args([*options_given, ""]))


def test_a_working_directory_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match="the working directory is gone"):
        script_options(build_parser([]).parse_args(["-m", "module"]))


def test_a_log_dir_is_made_and_proved_writable(tmp_path: Path) -> None:
    option_values.make_log_dir(str(tmp_path / "a" / "b"))
    assert list((tmp_path / "a" / "b").iterdir()) == []
    with pytest.raises(ConfigError, match=r"--log-dir '.*/train.py' cannot be written: .*File exists"):
        option_values.make_log_dir(str(tmp_path / "train.py"))


def test_options_of_scripts_mean_nothing_for_programs() -> None:
    with pytest.raises(ConfigError, match="--tee is for scripts and means nothing for the program 'generate'"):
        launch_options(build_parser([]).parse_args(["--tee", "3", "generate"]), "generate")


def test_programs_and_their_ranks_inherit_what_env_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZSPMD_TEST_SET", "before")
    launch_options(build_parser([]).parse_args(["--env", "ZSPMD_TEST_SET=after", "generate"]), "generate")
    assert os.environ["ZSPMD_TEST_SET"] == "after"


@pytest.mark.parametrize(
    ("arguments", "parallel"),
    [
        pytest.param(["--tp", "2", "--dp", "2", "--ep", "4"], ParallelConfig(tp=2, dp=2, ep=4), id="all-given"),
        pytest.param(["-n", "4", "--pp", "2", "--ep", "2"], ParallelConfig(tp=2, pp=2, ep=2), id="tp-is-the-rest"),
        pytest.param(["--dp", "3"], ParallelConfig(dp=3), id="ep-is-1"),
    ],
)
def test_the_mesh_of_a_program(arguments: list[str], parallel: ParallelConfig) -> None:
    options = launch_options(build_parser([]).parse_args(["--devices", "cpu", *arguments, "generate"]), "generate")
    assert options.parallel == parallel
    assert {name.strip("-") for name in arguments if name.startswith("--")} <= options.given


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--ep", "3", "--tp", "2"], r"ep 3 does not divide dp \* tp = 2", id="no-divisor"),
        pytest.param(["--ep", "0"], "ep is 0; it must be a whole number of at least 1", id="zero"),
    ],
)
def test_experts_that_cannot_be_spread_so(arguments: list[str], words: str) -> None:
    with pytest.raises(TopologyError, match=words):
        launch_options(build_parser([]).parse_args([*arguments, "generate"]), "generate")


@pytest.mark.parametrize("axis", ["tp", "pp", "dp", "ep"])
def test_a_script_has_no_axes(axis: str) -> None:
    with pytest.raises(ConfigError, match=f"--{axis} is for programs; a script lays out its own mesh"):
        parsed(f"--{axis}", "1")


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (["train.py"], "a script has none: give it to a program such as generate"),
        (["ps"], "--trace means nothing for the program 'ps'"),
    ],
    ids=["script", "program without steps"],
)
def test_a_trace_is_for_programs_with_steps(command: list[str], error: str) -> None:
    parsed = build_parser(["ps"]).parse_args(["--trace", "t.json", *command])
    with pytest.raises(ConfigError, match=error):
        script_options(parsed) if command[0].endswith(".py") else launch_options(parsed, "ps", takes_trace=False)
