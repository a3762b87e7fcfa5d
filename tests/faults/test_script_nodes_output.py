"""What ranks of several nodes print: whole lines on a slow terminal, exact files on their node, and disks that are full."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.polling import block_until
from support.script_nodes import ScriptNodes, finish, prefixed
from support.script_nodes import script_nodes as script_nodes
from support.terminals import IN_ITS_OWN_SESSION, terminal

PYTHON = ["--no-python", sys.executable, "-I", "-S", "-c"]
LOGS = "/run/logs"  # each host's own
NUM_RANKS, NUM_LINES, WIDTH = 8, 12000, 1000
TALKS = """
import os, pathlib, sys
rank, count, width = int(os.environ["RANK"]), *map(int, sys.argv[1:])
for first in range(0, count, 50):
    data = "".join(f"{rank} {number} ".ljust(width - 1, "x") + "\\n" for number in range(first, first + 50)).encode()
    while data:
        data = data[os.write(1, data) :]
pathlib.Path(f"done-{rank}").touch()
"""
ODD = r"""
import os
for data in (b"a" * 1_000_000 + b"\n", b"\xff\xfe \xc3\n", b"\r 10%\r 20%\r100%\n", b"last"):
    while data:
        data = data[os.write(1, data) :]
"""


def spoken(rank: int, count: int = NUM_LINES, width: int = WIDTH) -> bytes:
    """Return what TALKS prints."""
    return "".join(f"{rank} {number} ".ljust(width - 1, "x") + "\n" for number in range(count)).encode()


@pytest.fixture
def logs(script_nodes: ScriptNodes) -> Iterator[list[Path]]:
    """Where the hosts keep log files, as seen from here; none is left."""
    paths = [host.path(LOGS) for host in script_nodes.hosts]
    yield paths
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def test_a_slow_terminal_holds_no_rank_and_gets_whole_lines(script_nodes: ScriptNodes, logs: list[Path]) -> None:
    """Ranks say twice of what the launcher would let them have waiting; the terminal takes a kilobyte a second meanwhile."""
    command = ["--launch-id", "talk", *PYTHON, TALKS, str(NUM_LINES), str(WIDTH)]
    logs = [path / "zspmd" / "talk" for path in logs]
    with terminal() as screen:
        argv = [*IN_ITS_OWN_SESSION, *script_nodes.argv(*command, slots=(4, 2, 2))]
        process = script_nodes.cluster.run(0, argv, cwd=script_nodes.directory, env={"XDG_STATE_HOME": LOGS}, **screen.streams)
        screen.let_go()
        began = time.monotonic()

        def all_done() -> bool:
            if screen.size < 1024 * (time.monotonic() - began):
                screen.read(256)
            assert process.poll() is None, screen.text[-3000:]
            return all((script_nodes.directory / f"done-{rank}").exists() for rank in range(NUM_RANKS))

        block_until(all_done, 60.0)
        assert screen.size < 64 << 10
        screen.read_until(lambda: process.poll() is not None, 60.0)
        screen.read_until(lambda: not screen.read())
        assert process.returncode == 0
        shown = screen.text
    check_whole_lines(shown)
    check_none_is_lost(shown, (logs[0] / "launcher.log").read_text())
    for rank in range(NUM_RANKS):
        host = 0 if rank < 4 else rank // 2 - 1
        assert (logs[host] / f"r{rank:05d}.out").read_bytes() == spoken(rank)
    assert [sorted(path.name for path in directory.glob("r*.out")) for directory in logs[1:]] == [
        ["r00004.out", "r00005.out"],
        ["r00006.out", "r00007.out"],
    ]


def check_whole_lines(shown: str) -> None:
    """Assert that each line of a rank is one that it has printed, in its order."""
    last = dict.fromkeys(range(NUM_RANKS), -1)
    for line in shown.splitlines():
        if found := re.match(r"\[(\d)@node\d\] (.*)", line):
            rank, text = int(found[1]), found[2]
            number = int(text.split()[1])
            assert text == f"{rank} {number} ".ljust(WIDTH - 1, "x")
            assert number > last[rank]
            last[rank] = number


def check_none_is_lost(shown: str, launcher_log: str) -> None:
    """Assert that each line of a rank is on the terminal or among those that are told as left out, however many these are.

    Agents and launcher each leave out what they cannot keep. How much that is depends on how far each came while nobody read; and what
    an agent tells may be among the lines that the launcher leaves out: it stands in the launcher's log then.
    """
    by_agents = r"(\d+) log lines from node\d are not shown"
    by_launcher = [int(number) for number in re.findall(r"^\[zspmd\] (\d+) lines are not shown", shown, re.MULTILINE)]
    told = re.findall(by_agents, launcher_log)
    num_untold = len(told) - len(re.findall(by_agents, shown))
    num_shown = len(re.findall(r"^\[\d@node\d\] ", shown, re.MULTILINE))
    assert num_shown + sum(map(int, told)) + sum(by_launcher) - num_untold == NUM_RANKS * NUM_LINES


def test_long_lines_bytes_that_are_no_text_and_bars_of_another_node(script_nodes: ScriptNodes, logs: list[Path]) -> None:
    ended = script_nodes.run("--log-dir", LOGS, *PYTHON, ODD, slots=(1, 1, 1))
    assert ended.code == 0, ended.errors
    *parts, text, bar, last = prefixed(ended.out, 2)
    assert [part[-1] for part in parts[:-1]] == ["…"] * 15
    assert "".join(part.rstrip("…") for part in parts) == "a" * 1_000_000
    assert (text, bar, last) == ("\N{REPLACEMENT CHARACTER}" * 2 + " \N{REPLACEMENT CHARACTER}", "100%", "last")
    exact = b"a" * 1_000_000 + b"\n\xff\xfe \xc3\n\r 10%\r 20%\r100%\nlast"
    assert (logs[2] / "r00002.out").read_bytes() == exact


def test_a_full_disk_on_another_node_is_told_once_and_loses_no_line_on_the_way(script_nodes: ScriptNodes, logs: list[Path]) -> None:
    script_nodes.cluster.read(1, ["sh", "-c", f"mkdir {LOGS} && mount -t tmpfs -o size=1m logs {LOGS}"])
    ended = script_nodes.run("--log-dir", LOGS, *PYTHON, TALKS, "3000", str(WIDTH))
    kept = (logs[1] / "r00002.out").read_bytes()
    script_nodes.cluster.read(1, ["sh", "-c", f"umount {LOGS}"])
    assert ended.code == 0, ended.errors
    (told,) = [line for line in ended.errors.splitlines() if "written no further" in line]
    assert told.startswith(f"[zspmd] rank 2: {LOGS}/r00002.out is written no further: [Errno 28] No space left on device")
    assert 0 < len(kept) <= 1 << 20
    assert spoken(2, 3000).startswith(kept)
    assert prefixed(ended.out, 2) == spoken(2, 3000).decode().splitlines()
    assert (logs[2] / "r00003.out").read_bytes() == spoken(3, 3000)


def test_a_node_without_a_place_for_log_files_says_so_and_runs(script_nodes: ScriptNodes, logs: list[Path]) -> None:
    logs[1].write_text("a file, where a directory is asked for\n")
    ended = script_nodes.run("--log-dir", LOGS, "--no-python", "hostname")
    assert ended.code == 0, ended.errors
    assert len([line for line in ended.errors.splitlines() if "no log files are kept on node1" in line]) == 1
    assert (logs[2] / "r00003.out").read_text() == "node2\n"


@pytest.mark.long
def test_a_reader_that_pauses_has_ranks_everywhere_wait_and_loses_no_line(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin("--console", "0,3", *PYTHON, TALKS, str(3 * NUM_LINES), str(2 * WIDTH))
    done = [script_nodes.directory / f"done-{rank}" for rank in (0, 3)]
    with pytest.raises(TimeoutError):  # 144 MB are more than may wait anywhere
        block_until(lambda: any(path.exists() for path in done), 3.0)
    ended = finish(process, since=time.monotonic())
    assert ended.code == 0, ended.errors
    for rank in (0, 3):
        numbers = [int(line.split()[1]) for line in prefixed(ended.out, rank)]
        assert numbers == list(range(3 * NUM_LINES))


def test_a_reader_that_pauses_does_not_keep_a_signal_from_ending_ranks_of_other_nodes(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin("--no-python", "sh", "-c", "echo ready; exec yes 0123456789", num_ready=4)
    process.send_signal(signal.SIGINT)
    block_until(lambda: process.poll() is not None, 20.0)
    assert process.returncode == 130
    script_nodes.cluster.check_nothing_left(1.0)


def test_the_reader_of_a_launch_over_nodes_goes(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin(
        "--no-python", "sh", "-c", "echo ready; trap exit TERM; while :; do echo more; sleep 0.01; done", num_ready=4
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    block_until(lambda: process.poll() is not None, 20.0)
    assert process.returncode == 128 + signal.SIGPIPE
