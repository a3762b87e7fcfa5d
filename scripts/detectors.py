"""Delete one detector at a time in a throw-away copy of the tree, and run the tests that must notice.

A detector is found by its text, which must be there exactly once: where the code has changed, this says so rather than delete nothing.
Its tests must pass before it is deleted. Ends with 1 when a deletion made no test fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".git", ".venv", "build", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")
TEST_TIMEOUT_S = 40  # of one test: where a detector is gone, waiting is what most do
SHOWN = 3

AGENT, RANKS, GUARD = "runtime/launch/agent.py", "runtime/launch/rank_process.py", "runtime/launch/guard.py"
STREAM, WATCH, CONTROL = "runtime/launch/record_stream.py", "runtime/driver/watch.py", "runtime/driver/control.py"
SOCKETS, WINDOW, DOOR, SECURITY = "transport/sockets.py", "transport/window.py", "transport/door.py", "transport/security.py"
AGENT_TESTS, DEATHS = "tests/faults/test_agent.py", "tests/faults/test_agent_deaths.py"
GROUP_FAULTS, WATCH_TESTS, CONTROL_TESTS = (
    "tests/faults/test_group_faults.py",
    "tests/unit/driver/test_watch.py",
    "tests/unit/driver/test_control.py",
)
LEASE, DUTIES, ASSEMBLY = "runtime/launch/nodes/lease.py", "runtime/launch/nodes/node_duties.py", "runtime/launch/nodes/assembly.py"
REMOTE, PORTS, PROCESS = "runtime/launch/nodes/remote_agent.py", "runtime/launch/ports.py", "process.py"
NODES, NODES_LOST, NODES_START = (f"tests/faults/test_script_nodes{part}.py" for part in ("", "_lost", "_start"))
ESCAPED = f"{NODES}::test_what_a_rank_of_another_node_has_started_ends_with_it_and_strangers_live_on"
CUT = f"{NODES_LOST}::test_a_node_behind_a_cut_link_is_lost_on_both_sides_and_stays_so"
SOCKET_TESTS, WINDOW_TESTS = "tests/unit/transport/test_sockets.py", "tests/unit/transport/test_window.py"
DOOR_TESTS, WIRE_SECURITY, WIRE_FAULTS = (
    "tests/unit/transport/test_door.py",
    "tests/faults/test_wire_security.py",
    "tests/faults/test_wire_faults.py",
)


@dataclass(frozen=True)
class Detector:
    """A piece of the package that notices something.

    Attributes:
        old: its text in ``path``, there exactly once.
        new: what is put in its place.
        tests: what to run, as pytest takes it.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]


DETECTORS = [
    Detector(
        "pidfd of a rank",
        RANKS,
        "        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)\n",
        "",
        (
            f"{AGENT_TESTS}::test_a_signal_is_reported_with_the_log_tail",
            f"{GROUP_FAULTS}::test_a_rank_that_is_killed_is_blamed_while_its_peers_are_stuck",
        ),
    ),
    Detector(
        "pidfd of the driver",
        AGENT,
        "        loop.add_reader(self._driver_pidfd, self._on_driver_end)\n",
        "",
        (f"{AGENT_TESTS}::test_the_death_of_the_driver_ends_ranks_and_daemons",),
    ),
    Detector(
        "end of the stream between driver and agent",
        STREAM,
        "        if not data:\n            self._end(None)\n",
        "        if not data:\n            asyncio.get_running_loop().remove_reader(self._read_fd)\n",
        (
            f"{AGENT_TESTS}::test_an_agent_whose_stream_ends_needs_no_killing",
            f"{NODES_LOST}::test_the_death_of_the_launcher_leaves_nothing_on_any_node",
            f"{GROUP_FAULTS}::test_an_agent_that_is_killed_takes_the_group_with_it",
        ),
    ),
    Detector(
        "pidfd of the guard",
        AGENT,
        "        loop.add_reader(self._guard_pidfd, self._on_guard_end)\n",
        "",
        (f"{DEATHS}::test_one_below_the_driver_dies", ESCAPED),
    ),
    Detector(
        "guard, which ends what an agent leaves",
        GUARD,
        "if left := end_children(_REAP_S):",
        "if left := []:",
        (f"{DEATHS}::test_one_below_the_driver_dies", ESCAPED),
    ),
    Detector(
        "sweep of what ranks have started", AGENT, "            self._kill_orphans()\n            await", "            await", (ESCAPED,)
    ),
    Detector(
        "signal of the parent's death",
        PROCESS,
        "    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)\n",
        "",
        (f"{NODES_LOST}::test_the_death_of_agent_and_guard_at_once_ends_their_ranks",),
    ),
    Detector("lease at the driver", REMOTE, "        self._lease.start()\n", "", (CUT,)),
    Detector("lease at an agent", DUTIES, "        self._lease.start()\n", "", (CUT,)),
    Detector(
        "pause of one's own, in a lease",
        LEASE,
        "        self._num_silent += 1\n",
        "        self._num_silent += 1 + round((self._loop.time() - self._timer.when()) / self._beat_s)  # type: ignore\n",
        ("tests/unit/launch/test_lease.py",),
    ),
    Detector(
        "cause at an agent that lost its driver",
        AGENT,
        "        self._stream.send(DriverLost(reason))\n        self._is_mute = True\n",
        "",
        (f"{NODES_LOST}::test_a_launcher_that_stands_still_for_longer_finds_its_nodes_gone",),
    ),
    Detector(
        "version in a greeting",
        REMOTE,
        "        if version != __version__:\n",
        "        if False:\n",
        ("tests/unit/launch/test_remote_agent.py",),
    ),
    Detector(
        "proof of addresses",
        ASSEMBLY,
        "            await self._prove_addresses()\n",
        "            pass\n",
        (f"{NODES_START}::test_a_firewall_between_two_hosts_is_named_from_both_ends",),
    ),
    Detector(
        "facts of nodes, compared",
        ASSEMBLY,
        "            _raise(compare_facts(reference, named, allow_same_host=self._request.config.allow_same_host), self._names)\n",
        "            pass\n",
        (f"{NODES_START}::test_hosts_without_the_directory_and_with_another_script_are_named_each_on_a_line",),
    ),
    Detector(
        "hold of the master port",
        PORTS,
        "        if holder is not None:\n",
        "        if holder is not None:\n            holder.close()\n",
        (f"{NODES_START}::test_launches_at_once_over_the_same_hosts_share_no_port",),
    ),
    Detector(
        "who has signalled a rank",
        RANKS,
        "self._error_report(), ended_ns, self._was_signalled)",
        "self._error_report(), ended_ns)",
        ("tests/unit/launch/test_rank_process.py",),
    ),
    Detector(
        "beat of a rank",
        WATCH,
        "                self._check_silence(record.rank, now - max(record.beat_at, self._listening_from))\n",
        "",
        (WATCH_TESTS,),
    ),
    Detector(
        "answer that was lost",
        WATCH,
        "                self._check_answer(record.rank, record.beat.done_seq, now)\n",
        "",
        (WATCH_TESTS, f"{WIRE_FAULTS}::test_a_last_answer_that_is_dropped_is_named"),
    ),
    Detector(
        "sequence of steps, at a rank",
        SOCKETS,
        "            elif frame.seq == self.next_seq:\n                self.next_seq += 1\n",
        "            elif True:\n                self.next_seq = frame.seq + 1\n",
        (SOCKET_TESTS, "tests/faults/test_lost_frames.py"),
    ),
    Detector(
        "sequence of answers, at the driver",
        WINDOW,
        "        if seq != self._next_ack[rank] or seq >= self.oldest + self.in_flight:\n",
        "        if False:\n",
        (WINDOW_TESTS, f"{WIRE_FAULTS}::test_an_answer_that_is_dropped_is_named"),
    ),
    Detector(
        "epoch of steps, at a rank",
        SOCKETS,
        "            if frame.epoch != self.epoch:\n                self.dropped_foreign += 1\n            elif",
        "            if",
        (SOCKET_TESTS,),
    ),
    Detector(
        "epoch of answers, at the driver",
        SOCKETS,
        "        if frame.epoch != self.epoch:\n            self.dropped_foreign += 1\n            return None\n",
        "",
        (SOCKET_TESTS,),
    ),
    Detector(
        "ZAP's list of keys",
        DOOR,
        "        reason = self._refusal(domain.decode(), peer)\n",
        "        reason, peer = '', peer or _Peer('0', 0, 'rank 0')\n",
        (DOOR_TESTS, f"{WIRE_SECURITY}::test_a_stranger_with_an_unlisted_key_is_not_heard"),
    ),
    Detector(
        "ZAP's being asked at all",
        DOOR,
        "        socket.setsockopt(zmq.ZAP_DOMAIN, name.encode())\n        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)\n",
        "",
        (DOOR_TESTS,),
    ),
    Detector(
        "rank that its connection proves",
        DOOR,
        "        if sender == claimed:\n",
        "        if True:\n",
        (DOOR_TESTS, f"{WIRE_SECURITY}::test_a_rank_that_speaks_for_another_is_not_heard"),
    ),
    Detector("size of a part", SECURITY, "    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PART_BYTES)\n", "", (DOOR_TESTS,)),
    Detector(
        "token of a hello",
        CONTROL,
        "        if not hmac.compare_digest(hello.token, self._token):\n",
        "        if False:\n",
        (CONTROL_TESTS,),
    ),
]


class Tree:
    """A copy of the repository whose package is what its tests import."""

    def __init__(self, parent: Path) -> None:
        self.root = parent / "zspmd"
        self._environment = os.environ | {"PYTHONPATH": str(parent), "PYTHONDONTWRITEBYTECODE": "1"}
        shutil.copytree(ROOT, self.root, ignore=shutil.ignore_patterns(*LEFT_OUT))
        where = self._python("-c", "import zspmd; print(zspmd.__file__)").stdout.strip()
        if where != str(self.root / "__init__.py"):
            raise SystemExit(f"the tests of the copy would import {where}; unset PYTHONSAFEPATH and the like")

    def failures(self, tests: tuple[str, ...]) -> list[str]:
        """Run the tests and return the names of those that failed, or whose set-up or end did."""
        options = ["-q", "-rfE", "-p", "no:cacheprovider", "-o", f"timeout={TEST_TIMEOUT_S}"]
        done = self._python("-m", "pytest", *options, *tests)
        if done.returncode not in (0, 1):
            raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        names = re.findall(r"^(?:FAILED|ERROR) \S+?::(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return list(dict.fromkeys(names))

    def _python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=self.root, env=self._environment, capture_output=True, text=True)


def delete(detector: Detector, tree: Tree) -> list[str]:
    """Return the tests that fail without the detector; raises SystemExit where its text is not there exactly once."""
    path = tree.root / detector.path
    text = path.read_text()
    if (count := text.count(detector.old)) != 1:
        raise SystemExit(
            f"{detector.path} has the text of {detector.name!r} {count} times; bring scripts/detectors.py up to date:\n{detector.old}"
        )
    path.write_text(text.replace(detector.old, detector.new))
    try:
        return tree.failures(detector.tests)
    finally:
        path.write_text(text)


def main() -> None:
    """Print a row for each detector whose name has one of the words on the command line."""
    chosen = [one for one in DETECTORS if not sys.argv[1:] or any(word in one.name for word in sys.argv[1:])]
    if not chosen:
        raise SystemExit(f"no detector is called so; there are: {', '.join(one.name for one in DETECTORS)}")
    with tempfile.TemporaryDirectory(prefix="detectors-") as directory:
        tree = Tree(Path(directory))
        if failed := tree.failures(tuple(dict.fromkeys(test for one in chosen for test in one.tests))):
            raise SystemExit("these fail with every detector in its place: " + ", ".join(failed))
        width = max(len(one.name) for one in chosen)
        print(f"{'detector':{width}}  tests that fail without it", flush=True)
        unnoticed = []
        for one in chosen:
            failed = delete(one, tree)
            more = f" and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
            print(f"{one.name:{width}}  {len(failed)}: {', '.join(failed[:SHOWN]) or 'NONE'}{more}", flush=True)
            unnoticed += [] if failed else [one.name]
    if unnoticed:
        raise SystemExit("no test notices the loss of: " + ", ".join(unnoticed))


if __name__ == "__main__":
    main()
