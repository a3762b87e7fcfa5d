"""``report.json``: what it holds, that it is whole or not there, and which cause stands for an error."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from support.records import some_plan

from zspmd.errors import ConfigError, PeerLostError, PreflightError, ReadyTimeoutError, WorkerExitedError, ZspmdError
from zspmd.runtime.driver.script_faults import RankEnd, cause_of
from zspmd.runtime.launch.command import report as module
from zspmd.runtime.launch.command.exit_codes import cause_kind, exit_code
from zspmd.runtime.launch.command.report import CAUSES, build_report, write_report

END = RankEnd(1, 101, -11, 1.25, is_spontaneous=True, tail=("last words",), host="node1", error_s=0.0003)


def test_a_report_has_cause_ranks_and_nodes(tmp_path: Path) -> None:
    path = str(tmp_path / "report.json")
    told = build_report(
        launch_id="one",
        exit_code=139,
        cause=cause_of(END),
        argv=["zspmd-run", "train.py"],
        plan=some_plan("one", "node0", "node1"),
        ends=[END.as_dict()],
        elapsed_s=2.5,
        log_dir="/logs",
        left=[7],
    )
    assert write_report(path, told) is None
    read = json.loads(Path(path).read_text())
    assert (read["exit_code"], read["left"], read["world_size"], read["log_dir"]) == (139, [7], 2, "/logs")
    assert [(node["host"], node["is_local"]) for node in read["nodes"]] == [("node0", True), ("node1", False)]
    cause = read["cause"]
    assert (cause["kind"], cause["rank"], cause["host"], cause["at_s"], cause["error_s"]) == ("rank_signal", 1, "node1", 1.25, 0.0003)
    assert read["ranks"][0]["reason"] == "last words"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_cause_of_another_name_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="cause 'other' is none of"):
        build_report(launch_id="one", exit_code=1, cause={"kind": "other"}, argv=[])


def test_a_report_that_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    told = build_report(launch_id="one", exit_code=0, cause={"kind": "none"}, argv=[])
    (tmp_path / "directory").mkdir()
    trouble = write_report(str(tmp_path / "directory"), told)
    assert trouble is not None
    assert re.search("directory cannot be written: ", trouble)
    assert os.listdir(tmp_path) == ["directory"]


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (PreflightError([]), 120, "start_failed"),
        (PeerLostError("node1"), 121, "node_lost"),
        (ReadyTimeoutError("late"), 122, "not_ready"),
        (WorkerExitedError(exit_code=7, rank=1), 7, "rank_exit"),
        (WorkerExitedError(exit_code=-9, rank=1), 137, "rank_signal"),
        (ConfigError("wrong"), 2, "error"),
    ],
    ids=["preflight", "node lost", "not ready", "exit", "signal", "input"],
)
def test_the_cause_that_stands_for_an_error(error: ZspmdError, code: int, kind: str) -> None:
    assert (exit_code(error), cause_kind(error)) == (code, kind)
    assert kind in CAUSES


def test_every_cause_is_described() -> None:
    assert all(re.search(rf"\b{kind}\b", module.__doc__ or "") for kind in CAUSES)
