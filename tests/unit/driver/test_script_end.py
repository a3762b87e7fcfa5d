"""What the end of a script's launch comes to: code, summary and report, for each way in which it can end."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.records import some_plan

from zspmd.errors import LaunchError, NodeLostError
from zspmd.runtime.driver.script_end import ScriptEnd
from zspmd.runtime.driver.script_faults import RankEnd
from zspmd.runtime.launch.command.command_options import script_options
from zspmd.runtime.launch.command.option_parser import build_parser

LOST = ("Traceback (most recent call last):", '  File "a.py", line 9', "RuntimeError: Connection closed by peer")
LOSS = NodeLostError("node 1 (node1) is lost, with ranks 1: nothing was heard of it", host="node1", ranks=[1])


def end_of(*ends: RankEnd, hosts: tuple[str, ...] = ("node0", "node1"), report: str | None = None, **facts: Any) -> ScriptEnd:
    options = script_options(build_parser([]).parse_args(["--no-python", "true"]))
    return ScriptEnd(replace(options, report=report, timeout_s=1.0, log_dir="/logs"), some_plan("id", *hosts), ends, **facts)


def rank_end(rank: int, exit_code: int, at_s: float = 1.0, *, is_spontaneous: bool = True, **fields: Any) -> RankEnd:
    return RankEnd(rank, 100 + rank, exit_code, at_s, is_spontaneous, host=f"node{rank}", **fields)


FAILED = rank_end(0, 7)
EXPLAINED = rank_end(0, 1, stderr=LOST, tail=LOST)
ENDED = rank_end(1, -15, is_spontaneous=False)


@pytest.mark.parametrize(
    ("ends", "facts", "code", "kind"),
    [
        ([rank_end(0, 0), rank_end(1, 0)], {}, 0, "none"),
        ([FAILED, ENDED], {}, 7, "rank_exit"),
        ([rank_end(1, -11), ENDED], {}, 139, "rank_signal"),
        ([EXPLAINED, ENDED], {}, 1, "rank_exit"),
        ([EXPLAINED], {"error": LOSS}, 121, "node_lost"),
        ([], {"error": LOSS}, 121, "node_lost"),
        ([FAILED], {"error": LOSS}, 7, "rank_exit"),
        ([ENDED], {"is_overdue": True}, 124, "timeout"),
        ([ENDED], {"signals": [signal.SIGINT, signal.SIGTERM]}, 130, "stopped"),
        ([ENDED], {"signals": [signal.SIGPIPE]}, 141, "output_closed"),
        ([FAILED], {"signals": [signal.SIGINT]}, 7, "rank_exit"),
    ],
    ids=[
        *("done", "failed", "by a signal", "a lost peer", "a lost node explains it", "a lost node alone", "failed before the loss"),
        *("timeout", "Ctrl-C", "reader gone", "failed before Ctrl-C"),
    ],
)
def test_each_way_has_its_code_and_cause(tmp_path: Path, ends: list[RankEnd], facts: dict[str, Any], code: int, kind: str) -> None:
    path = tmp_path / "report.json"
    end = end_of(*ends, report=str(path), **facts)
    assert end.exit_code == code
    assert end.write_report() is None
    told = json.loads(path.read_text())
    assert (told["exit_code"], told["cause"]["kind"], len(told["ranks"])) == (code, kind, len(ends))
    assert (end.summary() is not None) == (kind in ("rank_exit", "rank_signal", "node_lost"))


def test_a_lost_node_is_the_first_cause_and_what_followed_is_below_it() -> None:
    summary = end_of(EXPLAINED, error=LOSS, cleanup_s=0.25, left=[77]).summary()
    assert summary is not None
    assert summary.splitlines() == [
        "FAILED with exit code 121",
        "  first cause  node 1 (node1) is lost, with ranks 1: nothing was heard of it",
        "  then",
        "    rank 0 @ node0 exited with code 1, +0.000 s: RuntimeError: Connection closed by peer",
        "  cleanup      1/2 ranks gone in 0.25 s; pids 77 are left",
        "  logs         /logs",
    ]


def test_a_failure_before_a_node_was_lost_is_told_with_the_loss() -> None:
    summary = end_of(FAILED, ENDED, error=LOSS).summary()
    assert summary is not None
    assert "  first cause  rank 0 @ node0 pid 100  exited with code 7" in summary
    assert summary.endswith(f"\n  and          {LOSS}")


@pytest.mark.parametrize("error", [LaunchError("pids 7 did not end"), LOSS], ids=["processes are left", "the agent of the only node"])
def test_other_errors_are_raised_and_reported_by_whoever_catches_them(tmp_path: Path, error: Any) -> None:
    end = end_of(ENDED, hosts=("node0",), error=error, report=str(tmp_path / "report.json"))
    assert (end.exit_code, end.summary(), end.write_report()) == (None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_what_was_ended_before_it_had_a_plan(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    end = replace(end_of(report=str(path), signals=[signal.SIGTERM]), plan=None)
    assert (end.exit_code, end.summary(), end.write_report()) == (143, None, None)
    assert json.loads(path.read_text())["world_size"] is None
