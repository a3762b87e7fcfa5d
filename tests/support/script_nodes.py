"""``zspmd-run`` on the first host of a ``Cluster``, with ranks on all of them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.cluster import Cluster
from support.cluster_host import ClusterHost
from support.node_faults import AGENT, GUARD, carriers, named, ranks, wait_named
from support.polling import block_until
from support.script_runs import RUN

SLOTS = (2, 1, 1)
PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
DEADLINE_S = 30.0
FOREVER = "exec sleep 600"


@dataclass(frozen=True)
class Ended:
    """How a launch ended, and how long that took from when it was asked."""

    code: int
    out: str
    errors: str
    elapsed_s: float

    @property
    def summary(self) -> str:
        """What is told of a failure; "" where there was none."""
        return self.errors.partition("[zspmd] FAILED")[2]

    @property
    def cause(self) -> str:
        """The line of the summary with the first cause."""
        return next((line.strip() for line in self.summary.splitlines() if "first cause" in line), "")


class ScriptNodes:
    """Starts launches over the hosts of a cluster, and has files with which ranks can be told to go on.

    Attributes:
        directory: seen by all hosts alike, as on a shared file system; the ranks' working directory too.
        hostfile: in place of the one that follows from ``slots``, where it is set.
    """

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        self.cluster = cluster
        self.directory = directory
        self.rsh = cluster.rsh()
        self.run_argv = list(RUN)
        self.hostfile = ""

    @property
    def hosts(self) -> list[ClusterHost]:
        return self.cluster.hosts

    def argv(self, *arguments: str, slots: Sequence[int] = SLOTS, rsh: str | None = None) -> list[str]:
        """Return the command line of a launch over the first hosts."""
        path = self.directory / "hostfile"
        path.write_text(self.hostfile or self.cluster.hostfile(slots))
        return [*RUN, "--hostfile", str(path), "--rsh", rsh or self.rsh, *arguments]

    def begin(
        self, *arguments: str, slots: Sequence[int] = SLOTS, rsh: str | None = None, num_ready: int = 0, **popen: Any
    ) -> subprocess.Popen[str]:
        """Start ``zspmd-run`` and return once so many ranks have printed "ready"."""
        options: dict[str, Any] = {**PIPES, "cwd": self.directory, **popen}
        process = self.cluster.run(0, self.argv(*arguments, slots=slots, rsh=rsh), **options)
        wait_ready(process, num_ready)
        return process

    def run(self, *arguments: str, timeout_s: float = DEADLINE_S, **options: Any) -> Ended:
        """Run ``zspmd-run`` to its end."""
        started = time.monotonic()
        return finish(self.begin(*arguments, **options), since=started, timeout_s=timeout_s)

    def go(self) -> float:
        """Let the ranks go on that wait for ``when_told``; returns when that was."""
        told = time.monotonic()
        (self.directory / "go").touch()
        return told

    def when_told(self, then: str) -> str:
        """Return what a shell does that says "ready", waits for ``go``, and does this."""
        return f"echo ready; until [ -e {self.directory}/go ]; do sleep 0.005; done; {then}"

    def by_rank(self, does: Mapping[int, str], others: str = f"echo ready; {FOREVER}") -> list[str]:
        """Return the arguments of a launch whose ranks are shells that do this."""
        cases = " ".join(f"{rank}) {what} ;;" for rank, what in does.items())
        return ["--no-python", "sh", "-c", f"case $RANK in {cases} *) {others} ;; esac"]

    def pid(self, name: str) -> int:
        """Wait for the pid that a rank writes to a file of ``directory``, and return it."""
        path = self.directory / name
        block_until(lambda: path.exists() and path.read_text().endswith("\n"))
        return int(path.read_text())

    def victim(self, process: subprocess.Popen[str], who: str, index: int) -> int:
        """Return the pid of the launcher, or of one of those by which it holds a host: "agent", "guard", "client" (of ssh or rsh)."""
        if who == "launcher":
            return process.pid
        if who == "client":
            return carriers(self.hosts[0], self.hosts[index].name)[0]
        return wait_named(self.hosts[index], {"agent": AGENT, "guard": GUARD}[who])

    def wait_ranks(self, index: int, count: int) -> dict[int, int]:
        """Wait until so many ranks are seen on a host, and return their pids; one that executes another program is not, for a moment."""
        block_until(lambda: len(ranks(self.hosts[index])) == count)
        return ranks(self.hosts[index])

    def wait_agents(self, count: int) -> list[int]:
        """Wait until so many agents run on the hosts, and return their pids in the order of hosts."""
        block_until(lambda: len(self._agents()) == count)
        return self._agents()

    def _agents(self) -> list[int]:
        return [pid for host in self.hosts for pid in named(host, AGENT)]


def wait_ready(process: subprocess.Popen[str], count: int) -> None:
    """Read the output of a launch until so many ranks have printed "ready"; raises AssertionError with all that it said if it ended."""
    assert process.stdout is not None
    while count:
        line = process.stdout.readline()
        if not line:
            _, errors = process.communicate(timeout=DEADLINE_S)
            raise AssertionError(f"zspmd-run ended with {process.returncode}: {errors}")
        count -= line.rstrip().endswith("ready")


def finish(process: subprocess.Popen[str], *, since: float, timeout_s: float = DEADLINE_S) -> Ended:
    """Wait for the end of a launch."""
    out, errors = process.communicate(timeout=timeout_s)
    return Ended(process.returncode, out or "", errors or "", time.monotonic() - since)


@pytest.fixture
def script_nodes(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptNodes:
    """Hand out launches over three hosts, with log files of their own; what is left on a host afterwards, the test is blamed for."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return ScriptNodes(cluster, tmp_path)


def prefixed(lines: str, rank: int) -> list[str]:
    """Return the lines of one rank, without what is put before them."""
    found = []
    for line in lines.splitlines():
        prefix, _, text = line.partition("] ")
        if prefix.strip().startswith(f"[{rank}@"):
            found.append(text)
    return found


def is_alive(pid: int) -> bool:
    """Say whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
