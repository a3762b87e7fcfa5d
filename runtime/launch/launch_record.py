"""What a live launch tells about itself, for ``zspmd-run ps``, ``logs`` and ``stop``: a private file in its run directory.

It goes with the run directory. It holds no secret: names, places, pids and paths, and the command that reaches each node.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ... import __version__
from ...config import NodesConfig
from ...errors import ConfigError
from .command.launcher_process import launcher_kind
from .hosts.host import Host
from .nodes.agent_link import rsh_argv
from .plan import LaunchPlan

RECORD_NAME = "launch.json"
KINDS = ("script", "program", "embedded")
_MAX_BYTES = 64 << 20


class NodeProcesses(Protocol):
    """What a ``NodeSupervisor`` knows of the processes of its node."""

    @property
    def pids(self) -> Mapping[int, int]: ...

    @property
    def agent_pid(self) -> int | None: ...

    @property
    def guard_pid(self) -> int | None: ...


@dataclass(frozen=True)
class RecordedRank:
    """One rank: its process, 0 where it had none yet, and the files that its streams go to, "" where there are none."""

    rank: int
    local_rank: int
    pid: int
    device: str
    out: str
    err: str


@dataclass(frozen=True)
class RecordedNode:
    """One node; ``rsh`` is the command that reaches it, without the line for its shell: empty for the launcher's own node and for one
    that has called in. ``guard_pid`` is what a signal is sent to that is to end the node's ranks; 0 where it is not known."""

    node_rank: int
    host: str
    target: str
    is_local: bool
    rsh: tuple[str, ...]
    address: str
    agent_pid: int
    guard_pid: int
    ranks: tuple[RecordedRank, ...]


@dataclass(frozen=True)
class LaunchRecord:
    """One launch.

    Attributes:
        kind: "script" and "program" are run by ``zspmd-run``, which ends them in order at SIGTERM; "embedded" belongs to a program of
            somebody's own, which gets no signal.
        pid: the driver or launcher; ``pid_start`` is when it began, in the kernel's ticks since boot, so that no other process is
            taken for it.
        started_at: seconds since 1970, ``started_uptime_s`` since boot.
        log_dir: "" for none.
    """

    launch_id: str
    kind: str
    pid: int
    pid_start: int
    argv: tuple[str, ...]
    cwd: str
    started_at: float
    started_uptime_s: float
    log_dir: str
    nodes: tuple[RecordedNode, ...]
    version: str = __version__

    @classmethod
    def of_this_process(
        cls,
        plan: LaunchPlan,
        processes: Sequence[NodeProcesses],
        *,
        is_script: bool = False,
        log_dir: str | None = None,
        hosts: Sequence[Host] | None = None,
        config: NodesConfig | None = None,
    ) -> LaunchRecord:
        """Return the record of a launch whose driver is this process.

        Args:
            processes: of each node of the plan, such as ``LaunchSupervisor.nodes``.
            hosts: those of the plan's nodes, and maybe others, where they are reached by ``config.rsh``. None for nodes that have
                called in.
        """
        by_name = {host.name: host for host in hosts or ()}
        nodes = tuple(
            _node(plan, node_rank, found, log_dir, by_name.get(plan.nodes[node_rank].name), config or NodesConfig())
            for node_rank, found in enumerate(processes)
        )
        return cls(
            launch_id=plan.launch_id,
            kind="script" if is_script else launcher_kind(),
            pid=os.getpid(),
            pid_start=process_start(os.getpid()) or 0,
            argv=tuple(sys.argv),
            cwd=os.getcwd(),
            started_at=time.time(),
            started_uptime_s=uptime_s(),
            log_dir=log_dir or "",
            nodes=nodes,
        )

    def write(self, directory: Path) -> str | None:
        """Write it into a run directory, whole or not at all; returns why it could not be: a launch goes on without."""
        new = directory / f"{RECORD_NAME}.new"
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "w") as file:
                json.dump(asdict(self), file)
            new.replace(directory / RECORD_NAME)
        except FileNotFoundError:  # the launch has ended by now, and its directory with it
            return None
        except OSError as error:
            return f"zspmd-run ps does not know this launch: {error}"
        return None

    @classmethod
    def read(cls, directory: Path) -> LaunchRecord:
        """Return the record in a run directory.

        Raises:
            FileNotFoundError: there is none, yet or any more.
            ConfigError: it cannot be read, such as that of another version.
        """
        path = directory / RECORD_NAME
        try:
            with open(path, "rb") as file:
                return _from_json(json.loads(file.read(_MAX_BYTES)))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read as zspmd {__version__} writes it: {type(error).__name__}: {error}") from error

    @property
    def world_size(self) -> int:
        return sum(len(node.ranks) for node in self.nodes)


def process_start(pid: int) -> int | None:
    """Return when a process began, in the kernel's ticks since boot: with its pid, that names it for ever. None where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def uptime_s() -> float:
    """Return the seconds since boot, those in which the machine slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _node(
    plan: LaunchPlan, node_rank: int, processes: NodeProcesses, log_dir: str | None, host: Host | None, config: NodesConfig
) -> RecordedNode:
    node, pids = plan.nodes[node_rank], processes.pids
    return RecordedNode(
        node_rank=node_rank,
        host=node.name,
        target=node.name if host is None else host.target,
        is_local=node.is_local,
        rsh=() if node.is_local or host is None else rsh_argv(host, config, "")[:-1],
        address=node.address,
        agent_pid=processes.agent_pid or 0,
        guard_pid=processes.guard_pid or 0,
        ranks=tuple(
            RecordedRank(
                place.rank,
                place.local_rank,
                pids.get(place.rank, 0),
                place.device,
                *("" if log_dir is None else os.path.join(log_dir, f"r{place.rank:05d}.{stream}") for stream in ("out", "err")),
            )
            for place in plan.node_ranks(node_rank)
        ),
    )


def _from_json(told: Any) -> LaunchRecord:
    nodes = tuple(
        RecordedNode(**{**node, "rsh": tuple(node["rsh"]), "ranks": tuple(RecordedRank(**rank) for rank in node["ranks"])})
        for node in told["nodes"]
    )
    record = LaunchRecord(**{**told, "argv": tuple(told["argv"]), "nodes": nodes})
    numbers = [record.pid, record.pid_start, *(pid for node in nodes for pid in (node.agent_pid, node.guard_pid))]
    words = [
        record.launch_id,
        record.kind,
        record.log_dir,
        record.cwd,
        *record.argv,
        *(word for node in nodes for word in (node.target, *node.rsh)),
    ]
    if not all(type(number) is int and number >= 0 for number in numbers) or not all(isinstance(word, str) for word in words):
        raise ValueError("a pid is no number, or a name no text")
    if record.kind not in KINDS:
        raise ValueError(f"kind {record.kind!r}")
    return record
