"""What is shown of a script's ranks on one node and on several: prefixes, filters, times."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.polling import block_until

from zspmd.errors import ConfigError
from zspmd.runtime.launch.command.command_options import script_options
from zspmd.runtime.launch.command.console import RankConsole
from zspmd.runtime.launch.command.option_parser import build_parser
from zspmd.runtime.launch.command.options import ScriptOptions
from zspmd.runtime.launch.command.rank_prefixes import rank_hosts, rank_prefixes
from zspmd.runtime.launch.command.script_console import ScriptConsole
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.launch.plan import LaunchPlan, NodePlan, RankPlan


def options(*given: str) -> ScriptOptions:
    return script_options(build_parser([]).parse_args([*given, "--no-python", "true"]))


def plan(*hosts: str) -> LaunchPlan:
    """A plan of one rank on each host, of which equal ones are one node."""
    names = list(dict.fromkeys(hosts))
    ranks = tuple(RankPlan(rank, hosts[:rank].count(host), names.index(host), "cpu") for rank, host in enumerate(hosts))
    return LaunchPlan("id", len(hosts), ranks, "127.0.0.1", 1, tuple(NodePlan(name, "", "") for name in names))


def show(capfd: pytest.CaptureFixture[str], given: ScriptOptions, of: LaunchPlan | None) -> tuple[str, str]:
    console = ScriptConsole(given, lambda: None)
    if of is not None:
        console.use_plan(of)
    for rank in range(of.world_size if of is not None else given.world_size or 0):
        console.show(rank, "out", [f"out {rank}"])
        console.show(rank, "err", [f"err {rank}"])
    console.say("own")
    console.show_failed(0, [f"line {number}" for number in range(50)])
    block_until(console.is_shown, 10)
    return capfd.readouterr()


def test_one_node(capfd: pytest.CaptureFixture[str]) -> None:
    out, err = show(capfd, options("-n", "2"), None)
    assert out == "[rank 0] out 0\n[rank 1] out 1\n"
    assert err == "[rank 0] err 0\n[rank 1] err 1\n[zspmd] own\n"


def test_several_nodes_have_their_names_padded_to_one_column(capfd: pytest.CaptureFixture[str]) -> None:
    out, _ = show(capfd, options("--host", "a:2,node-b:1"), plan("a", "a", "node-b"))
    assert out == "[0@a]      out 0\n[1@a]      out 1\n[2@node-b] out 2\n"


def test_ranks_whose_number_is_known_late(capfd: pytest.CaptureFixture[str]) -> None:
    given = options("--host", "a,b", "--console", "1", "-r", "0:1")
    assert given.world_size is None
    assert show(capfd, given, plan("a", "b"))[0] == "[1@b] out 1\n"
    with pytest.raises(ConfigError, match="--console is '1'; write all, failed or none, or list ranks from 0 to 0"):
        ScriptConsole(given, lambda: None).use_plan(plan("a"))


@pytest.mark.parametrize("given", [["--no-prefix"], ["--prefix", "none"]])
def test_no_prefix(capfd: pytest.CaptureFixture[str], given: list[str]) -> None:
    assert show(capfd, options("-n", "2", *given), plan("a", "b"))[0] == "out 0\nout 1\n"


def test_a_single_rank_has_none_wherever_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert show(capfd, options("--host", "a"), plan("a"))[0] == "out 0\n"


def test_times_since_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    out, err = show(capfd, options("-n", "2", "--timestamps"), None)
    assert re.fullmatch(r" +\+0\.\d{3} \[rank 0\] out 0\n +\+0\.\d{3} \[rank 1\] out 1\n", out)
    assert err.endswith("[zspmd] own\n")


def test_failed_shows_the_last_lines_of_a_rank_that_has(capfd: pytest.CaptureFixture[str]) -> None:
    out, err = show(capfd, options("-n", "2", "--console", "failed", "--tail", "2"), None)
    assert (out, err) == ("", "[zspmd] own\n[rank 0] line 48\n[rank 0] line 49\n")


def test_the_launcher_s_own_lines_are_kept(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = tmp_path / "launcher.log"
    given = ScriptOptions(**{**vars(options("-n", "2")), "launcher_log": str(log)})
    show(capfd, given, None)
    assert log.read_text() == "own\n"


def test_programs_show_the_same(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    log = str(tmp_path / "launcher.log")
    with RankConsole(2, hosts=["a", "bb"], shown=options("-n", "2", "--console", "1").shown, launcher_log=log) as console:
        console.on_log(0, "out", "zero")
        console.on_log(1, "out", "one")
        console.say("own")
    assert capfd.readouterr() == ("", "[1@bb] one\n[zspmd] own\n")
    assert Path(log).read_text() == "own\n"


def test_hosts_of_ranks_are_named_where_they_are_known() -> None:
    hosts = [Host("a", slots=2), Host("b", slots=2)]
    assert rank_hosts(hosts, 3) == ["a", "a", "b"]
    assert rank_hosts(hosts[:1], 2) == []
    assert rank_hosts([*hosts, Host("c")], 3) == []
    assert rank_prefixes(11)[9:] == ["[rank  9] ", "[rank 10] "]
