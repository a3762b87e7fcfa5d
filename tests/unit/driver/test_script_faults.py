"""Which rank of a script is blamed, and what is told of it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from zspmd.runtime.driver.script_faults import (
    MAX_TRACEBACK_LINES,
    RankEnd,
    cause_of,
    exit_code_of,
    find_traceback,
    first_cause,
    read_report,
    rivals,
    summarise,
)

TRACEBACK = ("Traceback (most recent call last):", '  File "a.py", line 3, in <module>', "    f()", "ValueError: no")
LOST = ("Traceback (most recent call last):", '  File "a.py", line 9', "RuntimeError: Connection closed by peer [::1]:4")
CHAINED = (*TRACEBACK, "", "During handling of the above exception, another exception occurred:", "", *LOST)
FATAL = ("Fatal Python error: Segmentation fault", "", "Current thread 0x1 (most recent call first):", '  File "a.py", line 3 in f')


def end(rank: int, exit_code: int = 1, at_s: float = 1.0, *, is_spontaneous: bool = True, **fields: Any) -> RankEnd:
    return RankEnd(rank, 100 + rank, exit_code, at_s, is_spontaneous, **fields)


@pytest.mark.parametrize(
    ("ends", "rank"),
    [
        ([end(0, at_s=2.0), end(1, at_s=1.5)], 1),
        ([end(0, 0, at_s=0.5), end(1, at_s=1.5)], 1),
        ([end(0, stderr=LOST, at_s=1.0), end(1, stderr=TRACEBACK, at_s=1.4)], 1),
        ([end(0, stderr=LOST, at_s=1.0), end(1, -15, is_spontaneous=False, at_s=1.4)], 0),
        ([end(0, -6, tail=("NCCL error: remote error",), at_s=1.0), end(1, -9, at_s=1.1)], 1),
        ([end(0, stderr=LOST, at_s=1.0), end(1, stderr=LOST, at_s=0.9)], 1),
    ],
    ids=[
        "earliest",
        "zero is no failure",
        "peer loss gives way",
        "but not to one that we ended",
        "killed behind an abort",
        "two peer losses",
    ],
)
def test_the_first_cause(ends: list[RankEnd], rank: int) -> None:
    random.Random(1).shuffle(ends)
    cause = first_cause(ends)
    assert cause is not None
    assert cause.rank == rank


def test_without_a_failure_there_is_no_cause() -> None:
    assert first_cause([end(0, 0), end(1, 0)]) is None


@pytest.mark.parametrize(("exit_code", "code"), [(7, 7), (-11, 139), (-9, 137), (255, 255)])
def test_exit_codes(exit_code: int, code: int) -> None:
    assert exit_code_of(end(0, exit_code)) == code


@pytest.mark.parametrize(
    ("stderr", "found"),
    [
        ((), ()),
        (("a warning", *TRACEBACK, "atexit: bye"), TRACEBACK),
        ((*LOST, *TRACEBACK), TRACEBACK),
        (("x", *CHAINED), CHAINED),
        (tuple(f"[rank3]: {line}" for line in TRACEBACK), TRACEBACK),
        ((*TRACEBACK, *FATAL), FATAL),
        (("Traceback (most recent call last):",), ("Traceback (most recent call last):",)),
    ],
    ids=["nothing", "between others", "the last", "chained", "behind torch's prefix", "faulthandler", "cut off"],
)
def test_a_traceback_is_found(stderr: tuple[str, ...], found: tuple[str, ...]) -> None:
    assert find_traceback(stderr) == found


def test_a_long_traceback_keeps_its_ends() -> None:
    long = (TRACEBACK[0], *(f"  line {number}" for number in range(500)), TRACEBACK[-1])
    found = find_traceback(long)
    assert len(found) == MAX_TRACEBACK_LINES + 1
    assert (found[0], found[-1]) == (TRACEBACK[0], TRACEBACK[-1])


@pytest.mark.parametrize(
    ("report", "found"),
    [
        (json.dumps({"message": {"message": "ValueError: no", "extraInfo": {"py_callstack": "\n".join(TRACEBACK) + "\n"}}}), TRACEBACK),
        (json.dumps({"message": {"message": "ValueError: no"}}), ("ValueError: no",)),
        (json.dumps({"message": "killed"}), ("killed",)),
        (json.dumps({"message": {"extraInfo": {"py_callstack": 3}}}), ()),
        (json.dumps(["message"]), ()),
        ('{"message": "cut of', ()),
        ("", ()),
    ],
    ids=["of @record", "without a callstack", "text", "number", "list", "cut off", "none"],
)
def test_a_report_is_read_whatever_it_holds(report: str, found: tuple[str, ...]) -> None:
    assert read_report(report) == found


def test_the_summary_has_cause_and_consequences() -> None:
    ends = [
        end(2, -15, 1.25, is_spontaneous=False),
        end(1, 1, 1.0, stderr=TRACEBACK, tail=TRACEBACK),
        end(0, 1, 1.125, stderr=LOST, tail=LOST),
        end(3, 0, 0.5),
        end(4, 3, 1.5, is_spontaneous=False),
    ]
    cause = first_cause(ends)
    assert cause is not None
    assert summarise(cause, ends, host="node0", log_dir="/logs").splitlines() == [
        "FAILED with exit code 1",
        "  first cause  rank 1 on node0, pid 101, exited with code 1, 1.000 s after the start",
        "  traceback",
        *(f"    {line}" for line in TRACEBACK),
        "  then",
        "    rank 0 exited with code 1, +0.125 s: RuntimeError: Connection closed by peer [::1]:4",
        "    rank 2 was ended by zspmd-run (SIGTERM), +0.250 s",
        "    rank 4 exited with code 3 after zspmd-run had sent it SIGTERM, +0.500 s",
        "  logs         /logs",
    ]


def test_ranks_that_were_done_early_are_told_where_nothing_else_explains_a_lost_peer() -> None:
    done, lost = end(1, 0, at_s=0.9), end(0, stderr=LOST, at_s=1.0)
    told = summarise(lost, [done, lost], host="h", log_dir=None)
    assert "  while these were done already\n    rank 1 exited with code 0, -0.100 s" in told
    raised = end(0, stderr=TRACEBACK, at_s=1.0)
    assert "done already" not in summarise(raised, [done, raised], host="h", log_dir=None)


def test_without_a_traceback_the_last_lines_are_told() -> None:
    cause = end(0, 7, tail=tuple(f"line {number}" for number in range(30)))
    told = summarise(cause, [cause], host="h", log_dir=None).splitlines()
    assert told[2:] == ["  last lines", *(f"    line {number}" for number in range(20, 30))]


def node_end(rank: int, host: str, exit_code: int = 1, at_s: float = 1.0, *, is_spontaneous: bool = True, **fields: Any) -> RankEnd:
    return end(rank, exit_code, at_s, is_spontaneous=is_spontaneous, host=host, error_s=0.0005, **fields)


def test_the_summary_of_several_nodes_names_them() -> None:
    cause = node_end(3, "node1", -11, 192.418, tail=("last words",))
    ends = [cause, node_end(0, "node0", at_s=192.438, stderr=LOST, tail=LOST), node_end(1, "node0", -15, 192.5, is_spontaneous=False)]
    told = summarise(cause, ends, host="driver", log_dir="/logs", cleanup="3/3 ranks gone in 0.31 s", report="/logs/report.json")
    assert told.splitlines() == [
        "FAILED with exit code 139",
        "  first cause  rank 3 @ node1 pid 103  was ended by SIGSEGV  at +192.418 s \N{PLUS-MINUS SIGN}0.5 ms",
        "  last lines",
        "    last words",
        "  then",
        "    rank 0 @ node0 exited with code 1, +0.020 s: RuntimeError: Connection closed by peer [::1]:4",
        "    rank 1 @ node0 was ended by zspmd-run (SIGTERM), +0.082 s",
        "  cleanup      3/3 ranks gone in 0.31 s",
        "  logs         /logs",
        "  report       /logs/report.json",
    ]


@pytest.mark.parametrize(
    ("other", "is_told"),
    [
        (node_end(1, "node1", at_s=1.0008), True),
        (node_end(1, "node1", at_s=1.0012), False),
        (node_end(1, "node0", at_s=1.0008), False),
        (node_end(1, "node1", at_s=1.0008, stderr=LOST), False),
        (node_end(1, "node1", 0, at_s=1.0008), False),
        (node_end(1, "node1", -15, at_s=1.0008, is_spontaneous=False), False),
    ],
    ids=["within the clocks' error", "later", "on the same clock", "a lost peer", "no failure", "ended by us"],
)
def test_two_causes_that_the_clocks_cannot_tell_apart_are_both_told(other: RankEnd, is_told: bool) -> None:
    cause = node_end(0, "node0", at_s=1.0, stderr=TRACEBACK)
    told = summarise(cause, [other, cause], host="driver", log_dir=None)
    assert rivals(cause, [other, cause]) == ([other] if is_told else [])
    assert ("  or           rank 1 @ node1 pid 101" in told) == is_told
    assert ("\n  then\n" in told) == (not is_told and other.exit_code != 0)


def test_ranks_that_were_ended_alike_share_a_line() -> None:
    cause = end(0)
    ends = [cause, *(end(rank, -15, 1.0 + rank / 8, is_spontaneous=False) for rank in range(1, 21)), end(21, 3, 1.5)]
    told = summarise(cause, ends, host="h", log_dir=None)
    assert told.splitlines()[-2:] == [
        "    rank 21 exited with code 3, +0.500 s",
        "    ranks 1-20 were ended by zspmd-run (SIGTERM), up to +2.500 s",
    ]


def test_the_number_of_last_lines_is_a_choice() -> None:
    cause = end(0, 7, tail=tuple(f"line {number}" for number in range(30)))
    assert summarise(cause, [cause], host="h", log_dir=None, tail=2).splitlines()[2:] == ["  last lines", "    line 28", "    line 29"]
    assert "last lines" not in summarise(cause, [cause], host="h", log_dir=None, tail=0)


def test_an_end_in_a_report() -> None:
    told = node_end(1, "node1", 1, 1.5, stderr=LOST, tail=LOST).as_dict()
    assert (told["is_consequence"], told["reason"], told["traceback"]) == (True, LOST[-1], list(LOST))
    assert cause_of(end(0, -9))["kind"] == "rank_signal"
    assert cause_of(end(0, 9))["kind"] == "rank_exit"
    assert end(0, 0, tail=LOST).as_dict()["reason"] == ""
