"""Scripts whose ranks fail, hang or do not listen on several nodes: who is blamed, what the exit code says, and that nothing is left."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from dataclasses import dataclass

import pytest
from support.host_proc import command_of
from support.node_faults import paused
from support.polling import block_until
from support.script_nodes import FOREVER, ScriptNodes, finish, is_alive
from support.script_nodes import script_nodes as script_nodes

# Each rank says "ready" and waits for a file with a time; it then fails so many seconds after that time as its argument says.
FAIL_AT = """
import os, pathlib, sys, time
rank, go = int(os.environ["RANK"]), pathlib.Path("go")
print("ready", flush=True)
while not go.exists():
    time.sleep(0.002)
after = sys.argv[1 + rank]
time.sleep(600 if after == "never" else max(0.0, float(go.read_text()) + float(after) - time.monotonic()))
os._exit(10 + rank)
"""


# --- who is blamed ---


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("exit 7", 7, "exited with code 7"),
        ("kill -SEGV $$", 139, "was ended by SIGSEGV"),
        ("kill -KILL $$", 137, "was ended by SIGKILL"),
    ],
    ids=["exit", "SEGV", "KILL"],
)
def test_a_rank_of_another_node_that_fails_is_blamed(script_nodes: ScriptNodes, how: str, code: int, words: str) -> None:
    process = script_nodes.begin(*script_nodes.by_rank({3: script_nodes.when_told(f"echo $$ > pid; echo last words; {how}")}), num_ready=4)
    ended = finish(process, since=script_nodes.go())
    assert ended.code == code
    assert ended.elapsed_s < 2.0
    assert re.fullmatch(rf"first cause +rank 3 @ node2 pid {script_nodes.pid('pid')} +{re.escape(words)}.* +at \+\d.*", ended.cause)
    assert f"with exit code {code}\n" in ended.summary
    assert "  last lines\n    ready\n    last words\n" in ended.summary
    assert re.findall(r"rank (\d) @ (\w+) was ended by zspmd-run \(SIGTERM\)", ended.summary.partition("  then\n")[2]) != []
    assert {int(rank) for rank in re.findall(r"rank (\d) @ \w+ was ended by zspmd-run", ended.summary)} == {0, 1, 2}
    assert re.search(r"cleanup +4/4 ranks gone in \d\.\d+ s\n", ended.summary)
    script_nodes.cluster.check_nothing_left(1.0)


def test_a_rank_of_another_node_that_is_done_early_is_no_failure_and_is_told_when_a_peer_fails_for_it(script_nodes: ScriptNodes) -> None:
    done = f"{sys.executable} -I -S -c 'import os; os._exit(0)'"
    fine = script_nodes.run("-q", *script_nodes.by_rank({3: done}, others="exit 0"))
    assert (fine.code, fine.errors) == (0, "")
    lost = "until [ -e left ]; do sleep 0.01; done; echo '[pair.cc] Connection closed by peer' >&2; exit 1"
    process = script_nodes.begin(*script_nodes.by_rank({3: f"{done}; touch left; exit 0", 0: f"echo ready; {lost}"}), num_ready=3)
    ended = finish(process, since=time.monotonic())
    assert ended.code == 1
    assert "rank 0 @ node0" in ended.cause
    assert re.search(r"while these were done already\n +rank 3 @ node2 exited with code 0", ended.summary)


def test_the_report_has_what_the_summary_tells(script_nodes: ScriptNodes) -> None:
    ended = script_nodes.run("--report", "report.json", *script_nodes.by_rank({2: "exit 7"}, others=FOREVER))
    report = json.loads((script_nodes.directory / "report.json").read_text())
    assert ended.code == report["exit_code"] == 7
    assert [report["cause"][name] for name in ("kind", "rank", "host", "exit_code")] == ["rank_exit", 2, "node1", 7]
    assert report["cause"]["error_s"] > 0


@dataclass(frozen=True)
class Pair:
    """Two ranks that fail after each other, and the one that the summary blames."""

    first: int
    blamed: int
    is_doubtful: bool  # the summary names the other as well

    @property
    def is_right(self) -> bool:
        return self.blamed == self.first or self.is_doubtful


def fail_in_turn(script_nodes: ScriptNodes, first: int, second: int, gap_s: float) -> Pair:
    """Have two ranks fail so many seconds apart, once clocks have been compared."""
    after = ["never"] * 4
    after[first], after[second] = "0", str(gap_s)
    command = ["--no-python", sys.executable, "-I", "-S", "-c", FAIL_AT, *after]
    process = script_nodes.begin(*command, num_ready=4)
    go = script_nodes.directory / "go"
    (script_nodes.directory / "new").write_text(str(time.monotonic() + 0.2))
    (script_nodes.directory / "new").rename(go)
    ended = finish(process, since=time.monotonic())
    go.unlink()
    found = re.match(r"first cause +rank (\d) ", ended.cause)
    assert found is not None, ended.errors
    rivals = [int(rank) for rank in re.findall(r"^ +or +rank (\d) @", ended.summary, re.MULTILINE)]
    blamed = int(found[1])
    assert ended.code == 10 + blamed
    return Pair(first, blamed, bool({first, second} <= {blamed, *rivals}))


@pytest.mark.parametrize(("first", "second"), [(3, 0), (0, 3), (2, 3)], ids=lambda rank: f"rank {rank}")
def test_of_two_failures_on_different_nodes_the_first_is_the_cause_or_both_are_named(
    script_nodes: ScriptNodes, first: int, second: int
) -> None:
    pairs = [fail_in_turn(script_nodes, first, second, 0.02) for _ in range(2)]
    assert [pair for pair in pairs if not pair.is_right] == []


@pytest.mark.long
@pytest.mark.parametrize("gap_s", [0.005, 0.02], ids="{:g} s".format)
@pytest.mark.parametrize(("first", "second"), [(3, 0), (0, 3), (2, 3), (3, 2)], ids=lambda rank: f"rank {rank}")
def test_of_fifty_pairs_of_failures_the_first_is_the_cause(script_nodes: ScriptNodes, first: int, second: int, gap_s: float) -> None:
    pairs = [fail_in_turn(script_nodes, first, second, gap_s) for _ in range(50)]
    assert len([pair for pair in pairs if not pair.is_right]) <= (3 if gap_s < 0.01 else 0), pairs


# --- ranks that do not listen, and what they have started ---


def test_ranks_everywhere_that_ignore_signals_are_killed_after_the_grace(script_nodes: ScriptNodes) -> None:
    fails, ignores = script_nodes.when_told("exit 7"), "trap '' TERM INT; echo ready; while :; do sleep 600; done"
    process = script_nodes.begin("--abort-grace", "0.5", *script_nodes.by_rank({0: fails}, others=ignores), num_ready=4)
    ended = finish(process, since=script_nodes.go())
    assert ended.code == 7
    assert "rank 0 @ node0" in ended.cause
    assert {int(rank) for rank in re.findall(r"rank (\d) @ \w+ was ended by zspmd-run \(SIGKILL\)", ended.summary)} == {1, 2, 3}
    assert 0.5 < ended.elapsed_s < 2.5
    script_nodes.cluster.check_nothing_left(1.0)


def test_a_stopped_rank_of_another_node_is_ended_too(script_nodes: ScriptNodes) -> None:
    process = script_nodes.begin("--abort-grace", "5", *script_nodes.by_rank({0: script_nodes.when_told("exit 7")}), num_ready=4)
    with paused(script_nodes.wait_ranks(2, 1)[3]):
        ended = finish(process, since=script_nodes.go())
    assert ended.code == 7
    assert "rank 3 @ node2 was ended by zspmd-run (SIGTERM)" in ended.summary
    assert ended.elapsed_s < 3.0


ESCAPES = """
sleep 600 &
setsid sleep 600 &
(setsid sh -c 'sleep 600 & exec sleep 600' &)
python=$1
$python -I -S -c '
import os, time
if not os.fork():
    os.setsid()
    if not os.fork():
        time.sleep(600)
    os._exit(0)
os.wait()
'
"""


@pytest.mark.parametrize("how", ["fails", "agent", "guard", "launcher", "client"])
def test_what_a_rank_of_another_node_has_started_ends_with_it_and_strangers_live_on(script_nodes: ScriptNodes, how: str) -> None:
    (script_nodes.directory / "escapes.sh").write_text(ESCAPES)
    stranger = script_nodes.cluster.run(2, ["setsid", "sleep", "601"])
    escapes = f". ./escapes.sh; {script_nodes.when_told('exit 7')}"
    command = script_nodes.by_rank({3: f"set -- {sys.executable}; {escapes}"})
    process = script_nodes.begin(*command, num_ready=4)
    host = script_nodes.hosts[2]
    block_until(lambda: sum(command_of(pid) == "sleep 600" for pid in host.processes()) == 4)
    if how == "fails":
        since = script_nodes.go()
    else:
        since = time.monotonic()
        os.kill(script_nodes.victim(process, how, 2), signal.SIGKILL)
    ended = finish(process, since=since)
    assert ended.code == {"fails": 7, "launcher": -signal.SIGKILL}.get(how, 121)
    assert ended.elapsed_s < 2.0
    assert "are left" not in ended.errors
    block_until(lambda: host.processes() == [stranger.pid], 2.0 if how != "launcher" else 3.0)
    assert is_alive(stranger.pid)
    stranger.kill()
    script_nodes.cluster.check_nothing_left(2.0)
