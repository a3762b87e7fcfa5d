"""Hosts in one text, in a program's list and from batch systems."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.host_texts import reading

from zspmd.errors import HostfileError
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.launch.hosts.host_lists import allocation_hosts, parse_host_list, parse_hosts

COUNTED = "--host: hosts are named repeatedly, so their slots add up, one for each mention without a number: "
LISTS: dict[str, tuple[str, list[str], list[str]]] = {
    "one": ("h", ["h"], []),
    "numbers": ("h1:2,h2,h3:5", ["h1 slots=2", "h2", "h3 slots=5"], []),
    "every kind": (
        "h1:2,lee@h2,[2001:db8::1]:3,2001:db8::2,n[1-2,7]",
        ["h1 slots=2", "lee@h2", "2001:db8::1 slots=3", "2001:db8::2", "n1", "n2", "n7"],
        [],
    ),
    "ranges with slots": ("n[01-02]:4,m", ["n01 slots=4", "n02 slots=4", "m"], []),
    "blanks behind commas": ("h1, h2:2 ,\th3", ["h1", "h2 slots=2", "h3"], []),
    "repeats": ("h,g,h", ["h slots=2", "g slots=1"], [COUNTED + "h 2, g 1"]),
    "repeats with numbers add": ("h:2,h,h:3", ["h slots=6"], [COUNTED + "h 6"]),
    "excluded": ("n[1-3],^n2", ["n1", "n3"], ["--host: n2 is left out, as '^' on column 8 says"]),
    "no slots": ("h:0,g", ["g"], ["--host: h is left out, as it has no slots on column 1"]),
}
EMPTY = "an entry is empty; write hosts with one comma between two"
NO_KEYS = "has keys or blanks; an entry here is HOST, HOST:N or USER@HOST; a hostfile takes keys"
BAD_LISTS: dict[str, tuple[str, list[str]]] = {
    "empty": ("", [f"1: {EMPTY}"]),
    "a comma too many": ("h,,g,", [f"3: {EMPTY}", f"6: {EMPTY}"]),
    "a blank entry": ("h, ", [f"3: {EMPTY}"]),
    "keys": ("h,g slots=2", [f"3: 'g slots=2' {NO_KEYS}"]),
    "a key alone": ("slots=2", [f"1: 'slots=2' {NO_KEYS}"]),
    "blanks between": ("h g", [f"1: 'h g' {NO_KEYS}"]),
    "a port": ("lee@h,lee@g:2222", ["13: ':2222' looks like a port: write port=2222, or slots=2222 where slots are meant"]),
    "two problems": (
        "h:x,n[3-1]:2",
        [
            "3: ':x' is no number of slots from 0 to 65536; write HOST:N, or port=N for the port of ssh",
            "5: '[3-1]' runs backwards: 3 is more than 1",
        ],
    ),
    "another user": (
        "a@h,b@h",
        ["5: 'h' is on column 1 and on column 5, with another user; give that once, where the host is named first"],
    ),
    "an open bracket": ("n[1,h", ["1: 'n[1,h': a bracket has no partner; write a range as n[1-4], an IPv6 address as [2001:db8::1]"]),
    "who is excluded is not there": ("^h", ["1: '^h' excludes a host that is not named here"]),
}


@pytest.mark.parametrize(("text", "expected", "notes"), LISTS.values(), ids=LISTS)
def test_a_list(text: str, expected: list[str], notes: list[str]) -> None:
    said: list[str] = []
    hosts = parse_host_list(text, said)
    assert (reading(hosts), said, {host.where for host in hosts}) == (expected, notes, {"--host"})


@pytest.mark.parametrize(("text", "problems"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_bad_list(text: str, problems: list[str]) -> None:
    with pytest.raises(HostfileError) as caught:
        parse_host_list(text)
    assert str(caught.value) == "\n".join(f"--host:1:{problem}" for problem in problems)


def test_entries_of_a_program() -> None:
    made = Host("m", slots=3, user="lee")
    hosts = parse_hosts(["h slots=2 port=2200  # comment", made, "[2001:db8::1]:2", "n[1-2]", "^n1"])
    assert reading(hosts) == ["h slots=2 port=2200", "lee@m slots=3", "2001:db8::1 slots=2", "n2"]
    assert [host.where for host in hosts] == [f"launch(hosts=...):{number}" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("entries", "problems"),
    [
        ([], [" it names no host; name at least one to run on"]),
        (["h", ""], ["2:1: '' names no host; leave the entry out"]),
        (["# h"], ["1:1: '# h' names no host; leave the entry out"]),
        ([7], ["1:1: '7' is no text and no Host; write a line as in a hostfile"]),
        (["h\ng"], ["1:1: 'h\\ng' is no host name: it takes at most 253 letters, digits, '.', '-' and '_', and begins with no '.' or '-'"]),
        (
            ["h:22", "g slots=x"],
            [
                "1:3: ':22' looks like a port: write port=22, or slots=22 where slots are meant",
                "2:3: slots='x' is no whole number from 0 to 65536",
            ],
        ),
        (
            [Host("h", slots=1), "h"],
            ["2:1: 'h' is on line 1 and on line 2, with a number of slots; keep one of them, or no number on any of its lines"],
        ),
    ],
    ids=["none", "an empty one", "a comment", "a number", "two lines", "a port", "a Host twice"],
)
def test_bad_entries_of_a_program(entries: Sequence[Any], problems: list[str]) -> None:
    with pytest.raises(HostfileError) as caught:
        parse_hosts(entries)
    assert str(caught.value) == "\n".join(f"launch(hosts=...):{problem}" for problem in problems)


# --- batch systems

SLURM: dict[str, tuple[dict[str, str], list[str]]] = {
    "nodes alone": ({"NODELIST": "n[1-2]"}, ["n1", "n2"]),
    "tasks of each node": (
        {"NODELIST": "n[01-04,7],m", "TASKS": "4(x2),3,2(x3)"},
        ["n01 slots=4", "n02 slots=4", "n03 slots=3", "n04 slots=2", "n7 slots=2", "m slots=2"],
    ),
    "tasks, and how many were asked for": (
        {"NODELIST": "n[1-2]", "TASKS": "8(x2)", "CPUS": "8(x2)", "NTASKS": "16"},
        ["n1 slots=8", "n2 slots=8"],
    ),
    "tasks per node that were asked for": ({"NODELIST": "n[1-2]", "NTASKS_PER_NODE": "4"}, ["n1 slots=4", "n2 slots=4"]),
    "both, of which the exact one counts": ({"NODELIST": "n[1-2]", "NTASKS_PER_NODE": "4", "TASKS": "4,3"}, ["n1 slots=4", "n2 slots=3"]),
    "cores that nobody asked for": ({"NODELIST": "n[1-2]", "TASKS": "64(x2)", "CPUS": "64(x2)"}, ["n1", "n2"]),
    "two ranges in a name": ({"NODELIST": "r[1-2]n[08-09]", "TASKS": "2(x4)"}, [f"r{r}n{n} slots=2" for r in (1, 2) for n in ("08", "09")]),
}
LONG = {
    "NODELIST": "SLURM_JOB_NODELIST",
    "TASKS": "SLURM_TASKS_PER_NODE",
    "CPUS": "SLURM_JOB_CPUS_PER_NODE",
    "NTASKS": "SLURM_NTASKS",
    "NTASKS_PER_NODE": "SLURM_NTASKS_PER_NODE",
}


def slurm(short: dict[str, str]) -> dict[str, str]:
    return {LONG[name]: value for name, value in short.items()}


@pytest.mark.parametrize(("short", "expected"), SLURM.values(), ids=SLURM)
def test_slurm(short: dict[str, str], expected: list[str]) -> None:
    hosts = allocation_hosts(slurm(short))
    assert hosts is not None
    assert (reading(hosts), {host.where for host in hosts}) == (expected, {"SLURM_JOB_NODELIST"})


def test_slurm_says_when_it_counts_cores() -> None:
    notes: list[str] = []
    allocation_hosts(slurm({"NODELIST": "n1", "TASKS": "64", "CPUS": "64"}), notes)
    assert notes == ["SLURM_TASKS_PER_NODE=64 counts cores, as the job asked for no tasks: slots are not taken from it"]


@pytest.mark.parametrize(
    ("short", "message"),
    [
        (
            {"NODELIST": "n[1-"},
            "SLURM_JOB_NODELIST:1:1: 'n[1-': a bracket has no partner; write a range as n[1-4], an IPv6 address as [2001:db8::1]",
        ),
        (
            {"NODELIST": "n1", "TASKS": "4(x2)"},
            "SLURM_TASKS_PER_NODE:1:1: '4(x2)' is for 2 nodes, and SLURM_JOB_NODELIST names 1; were they set by hand?",
        ),
        ({"NODELIST": "n[1-3]", "TASKS": "4,x"}, "SLURM_TASKS_PER_NODE:1:3: 'x' is no number of tasks; Slurm writes 4 or 4(x2)"),
        (
            {"NODELIST": "n1", "TASKS": "4(x999999999)"},
            "SLURM_TASKS_PER_NODE:1:1: '4(x999999999)' is no number of tasks; Slurm writes 4 or 4(x2)",
        ),
        ({"NODELIST": "n1", "TASKS": "0"}, "SLURM_TASKS_PER_NODE:1:1: '0' is no number of tasks; Slurm writes 4 or 4(x2)"),
        ({"NODELIST": "n1", "NTASKS_PER_NODE": "x"}, "SLURM_NTASKS_PER_NODE:1:1: slots='x' is no whole number from 1 to 65536"),
    ],
    ids=["a list cut short", "more tasks than nodes", "no number", "far too many nodes", "no task", "no number per node"],
)
def test_slurm_that_cannot_be(short: dict[str, str], message: str) -> None:
    with pytest.raises(HostfileError) as caught:
        allocation_hosts(slurm(short))
    assert str(caught.value) == message


@pytest.mark.parametrize("variable", ["PBS_NODEFILE", "LSB_DJOB_HOSTFILE"])
def test_a_line_for_each_slot(tmp_path: Path, variable: str) -> None:
    (tmp_path / "nodes").write_text("n1.x\nn1.x\nn2.x\nn1.x\n")
    hosts = allocation_hosts({variable: str(tmp_path / "nodes")})
    assert hosts is not None
    assert (reading(hosts), hosts[1].where) == (["n1.x slots=3", "n2.x slots=1"], f"{variable}={tmp_path}/nodes:3")


def test_a_line_for_each_slot_without_repeats(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("n1\nn2\n")
    assert reading(allocation_hosts({"PBS_NODEFILE": str(tmp_path / "nodes")}) or []) == ["n1 slots=1", "n2 slots=1"]


def test_sge(tmp_path: Path) -> None:
    (tmp_path / "pe").write_text("n1.x 4 all.q@n1.x UNDEFINED\r\n\nn2.x 2 all.q@n2.x <NULL>\nn1.x 1 short.q@n1.x 0,1:0,2\n")
    notes: list[str] = []
    assert reading(allocation_hosts({"PE_HOSTFILE": str(tmp_path / "pe")}, notes) or []) == ["n1.x slots=5", "n2.x slots=2"]
    assert len(notes) == 1
    assert notes[0].endswith("one for each mention without a number: n1.x 5, n2.x 2")


def test_sge_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "pe").write_text("n1\nn2 two all.q\n")
    with pytest.raises(HostfileError) as caught:
        allocation_hosts({"PE_HOSTFILE": str(tmp_path / "pe")})
    assert str(caught.value).replace(str(tmp_path), "") == (
        "PE_HOSTFILE=/pe:1:1: 'n1' has no number of slots behind it; SGE writes HOST SLOTS QUEUE CORES\n"
        "PE_HOSTFILE=/pe:2:4: slots='two' is no whole number from 0 to 65536"
    )


@pytest.mark.parametrize("variable", ["PBS_NODEFILE", "LSB_DJOB_HOSTFILE", "PE_HOSTFILE"])
def test_a_file_of_the_batch_system_that_is_gone(variable: str) -> None:
    with pytest.raises(HostfileError) as caught:
        allocation_hosts({variable: "/gone/nodes"})
    assert str(caught.value) == f"{variable}=/gone/nodes: it cannot be read: No such file or directory; give the path of a hostfile"


@pytest.mark.parametrize(
    "environment", [{}, {"SLURM_JOB_NODELIST": "", "PBS_NODEFILE": ""}, {"SLURM_TASKS_PER_NODE": "4"}], ids=["none", "empty", "half"]
)
def test_outside_of_an_allocation(environment: dict[str, str]) -> None:
    assert allocation_hosts(environment) is None


def test_slurm_comes_first() -> None:
    assert reading(allocation_hosts({"PBS_NODEFILE": "/gone", "SLURM_JOB_NODELIST": "n1"}) or []) == ["n1"]
