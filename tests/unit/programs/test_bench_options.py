"""``zspmd-run bench``: what its command line means, what it refuses before it starts anything, and what it writes."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from support.programs import run_program

from zspmd.config import ParallelConfig
from zspmd.errors import ConfigError
from zspmd.runtime.launch.command.options import LaunchOptions
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.programs import bench
from zspmd.runtime.programs.bench import output, rivals, step, targets
from zspmd.runtime.programs.bench.report import Report
from zspmd.runtime.programs.bench.rows import Row


def prepared(*argv: str, options: LaunchOptions | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = parser.parse_args(argv)
    bench.prepare(arguments, options or LaunchOptions(ParallelConfig(), "unused", ("cpu",), None, is_quiet=True))
    return arguments


class Fake(ModuleType):
    """A benchmark of one row.

    It stands in the place of the real ones.
    """

    TURNS = 3

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__("fake", type(self).__doc__)
        self.error = error

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--ranks", type=int, nargs="+")

    def prepare(self, arguments: argparse.Namespace, options: LaunchOptions) -> str:
        return f"ranks {arguments.ranks}"

    async def measure(self, arguments: argparse.Namespace, options: LaunchOptions, report: Report) -> None:
        report.title, report.x_axis = "Fake", "ranks"
        for ranks in (1, 2):
            report.add(Row({"ranks": ranks}, "fake", "us", [[float(number + ranks) for number in range(120)]] * arguments.turns))
        if self.error is not None:
            raise self.error


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr(bench, "_modules", lambda: {"fake": fake})
    return fake


def test_bench_alone_lists_the_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(bench) == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in ("step", "collective", "wire", "idle", "scale", "targets"):
        assert f" {name} " in text
    assert "Round trip of a step, and steps per second with several in flight" in text


def test_a_report_is_shown_and_written(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program(bench, "fake", "--turns", "4", "--json", str(tmp_path / "out.json")) == 0
    told = json.loads((tmp_path / "out.json").read_text())
    assert [(row["case"], row["samples"], row["p99"] is not None) for row in told["rows"]] == [({"ranks": n}, 480, True) for n in (1, 2)]
    shown = capsys.readouterr().out
    assert "Fake" in shown
    assert "load" in shown
    assert "command: " in shown


def test_what_was_measured_before_an_error_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "_modules", lambda: {"fake": Fake(ConfigError("no more"))})
    assert run_program(bench, "fake") == 2
    told = capsys.readouterr()
    assert "note: not whole: it ended before its end" in told.out
    assert "zspmd-run: no more" in told.err


def test_what_was_measured_before_a_cancellation_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "_modules", lambda: {"fake": Fake(asyncio.CancelledError())})
    with pytest.raises(asyncio.CancelledError):
        run_program(bench, "fake")
    assert "note: not whole: it ended before its end" in capsys.readouterr().out


def test_ranks_of_the_launch_are_the_benchmarks(fake: Fake) -> None:
    options = LaunchOptions(ParallelConfig(tp=3), "unused", ("cpu",) * 3, None, True, given=frozenset({"num-ranks"}))
    assert prepared("fake", options=options).ranks == [3]
    with pytest.raises(ConfigError, match="-n 3 and --ranks are both given"):
        prepared("fake", "--ranks", "2", options=options)


@pytest.mark.parametrize("axis", ["tp", "pp", "dp", "ep"])
def test_axes_that_a_benchmark_does_not_heed_are_refused(fake: Fake, axis: str) -> None:
    options = LaunchOptions(ParallelConfig(tp=2), "unused", ("cpu",) * 2, None, True, given=frozenset({axis}))
    with pytest.raises(ConfigError, match=f"--{axis} means nothing for bench fake; leave it out"):
        prepared("fake", options=options)


def test_an_engine_takes_tp_from_the_launch_and_no_other_axis() -> None:
    options = LaunchOptions(ParallelConfig(tp=2), "unused", ("cpu",) * 2, None, True, given=frozenset({"tp"}))
    assert prepared("engine", options=options).tp == [2]
    with pytest.raises(ConfigError, match="--pp means nothing for bench engine"):
        prepared("engine", options=replace(options, given=frozenset({"tp", "pp"})))


def test_a_benchmark_of_this_machine_takes_no_hosts(fake: Fake) -> None:
    options = LaunchOptions(ParallelConfig(), "unused", (), None, True, hosts=(Host("n1"),))
    with pytest.raises(ConfigError, match="bench fake measures this machine alone"):
        prepared("fake", options=options)


def test_one_host_has_all_ranks_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    both = LaunchOptions(ParallelConfig(), "unused", (), None, True, hosts=(Host("n1"), Host("n2")))
    with pytest.raises(ConfigError, match="2 hosts are given; bench step takes one"):
        prepared("step", options=both)
    one = LaunchOptions(ParallelConfig(), "unused", (), None, True, hosts=(Host("n1"),))
    arguments = prepared("step", options=one)
    assert (arguments.transport, arguments.rivals) == (["tcp"], [])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(["step", "--ranks", "0"], "--ranks is 0; it must be from 1 to 256", id="no-ranks"),
        pytest.param(["step", "--window", "99"], "--window is 99; it must be from 1 to 64", id="window"),
        pytest.param(["step", "--steps", "0"], "--steps is 0; it must be from 1", id="no-steps"),
        pytest.param(["step", "--turn-s", "0"], "--turn-s is 0; it must be above 0", id="no-time"),
        pytest.param(["step", "--turns", "0"], "--turns is 0; it must be from 1", id="no-turns"),
        pytest.param(["step", "--json", "nowhere/at/all.json"], "--json 'nowhere/at/all.json' cannot be written", id="json"),
        pytest.param(["step", "--plot", "a.gif"], "--plot 'a.gif' has no known ending; give FILE.png or FILE.html", id="plot"),
        pytest.param(["collective", "--ranks", "1"], "--ranks is 1; it must be from 2", id="alone"),
        pytest.param(["collective", "--size", "5"], "--size is 5; it must be a multiple of 4", id="odd-size"),
        pytest.param(["collective", "--backend", "smh"], "communicator is 'smh' .did you mean 'shm'", id="backend"),
        pytest.param(["wire", "--batch", "0"], "--batch is 0; it must be from 1", id="no-batch"),
        pytest.param(["idle", "--seconds", "0"], "--seconds is 0; it must be above 0", id="no-seconds"),
        pytest.param(["scale", "--ranks", "99999"], "--ranks is 99999; it must be from 1 to 4096", id="too-many"),
        pytest.param(["targets", "--plot", "a.png"], "--plot draws one benchmark", id="plot-of-several"),
    ],
)
def test_wrong_options_are_refused_before_anything_starts(argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=message):
        prepared(*argv)


@pytest.mark.parametrize("argv", [["step", "--payload", "1G"], ["step", "--rivals", "mpi"], ["steps"]], ids=["size", "rival", "name"])
def test_what_the_parser_refuses(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        prepared(*argv)
    told = capsys.readouterr().err
    assert "1G" in told or "mpi" in told or "steps" in told


def test_a_plot_without_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install 'zspmd\\[bench\\]'"):
        prepared("wire", "--plot", "a.png")


@pytest.mark.keeps_descriptors("matplotlib keeps the files of its fonts open")
@pytest.mark.parametrize("name", ["plot.png", "plot.html"])
def test_a_plot_has_distributions_and_curves(fake: Fake, name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'zspmd[bench]'")
    assert run_program(bench, "fake", "--plot", str(tmp_path / name)) == 0
    drawn = (tmp_path / name).read_bytes()
    if name.endswith(".png"):
        assert drawn.startswith(b"\x89PNG")
    else:
        assert drawn.count(b"<svg") == 1
        assert b"command: " in drawn


def test_a_rival_that_is_not_there_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rival = rivals.Rival("Ray", "ray_steps", needs="no-such-distribution")
    assert rival.why_not() == "Ray: no-such-distribution is not installed; pip install no-such-distribution"
    monkeypatch.setattr(rivals, "DIRECTORY", tmp_path)
    assert f"Ray: {tmp_path / 'ray_steps'}.py is not there" in str(rival.why_not())


def test_every_rival_of_a_step_has_its_program() -> None:
    assert all((rivals.DIRECTORY / f"{rival.program}.py").is_file() for rival in step.RIVALS.values())


def test_targets_are_judged_in_every_case_that_they_mean(capsys: pytest.CaptureFixture[str]) -> None:
    part, report = Report("step"), Report("targets")
    for ranks, ours_us in ((1, 60.0), (2, 90.0)):
        case = {"ranks": ranks, "in flight": 1}
        part.add(Row(case, step.OURS, "us", [[ours_us]]))
        part.add(Row(case, step.RAW, "us", [[60.0]]))
    part.add(Row({"ranks": 1, "in flight": 4}, step.OURS, "us", [[20.0]], {"x trips": 3.0}))
    for target in targets.TARGETS:
        if target.part == "step":
            targets._judge(target, part, report)
    verdicts = [(row.case["figure"], row.samples, row.facts["target"], row.facts["verdict"]) for row in report.rows]
    assert verdicts == [
        ("round trip to raw pyzmq", [1.0], "<= 1.25", "met"),
        ("round trip to raw pyzmq", [1.5], "<= 1.25", "missed"),
        ("steps/s with 4 in flight to one by one", [3.0], ">= 2", "met"),
    ]
    assert "not measured: step: round trip to torch RPC" in report.notes


def test_the_parts_of_targets_have_options_that_they_take() -> None:
    options = LaunchOptions(ParallelConfig(), "unused", ("cpu",), None, is_quiet=True)
    assert targets.prepare(prepared("targets"), options).startswith("wire, collective, idle, step, start, engine, speculation")
