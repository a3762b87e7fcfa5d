"""What the options of ``zspmd-run`` ask for: a launch of a program's ranks, or one of a script's. ``command_options`` makes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ....config import Deadlines, NodesConfig, ParallelConfig
from ..hosts.host import Host
from .host_options import ManualNode
from .shown_streams import TAIL_LINES, ShownStreams

if TYPE_CHECKING:
    from ..dial.dial_place import DialPlace


@dataclass(frozen=True)
class LaunchOptions:
    """What the command line says about the launch, apart from its program.

    Attributes:
        devices: by rank; with ``hosts`` it is empty, and ``device_spec`` goes to the nodes as it was written.
        hosts: None for this machine alone; ``notes`` say how they came about where nobody named them.
        lease_s: for how long a node may be silent.
        report: where to write how the launch ended; None for nowhere. ``trace``: where its timeline goes.
        timeout_s: how long the launch may take; 0 for ever.
        given: the options, of those that have a default, that were on the command line: for a program that knows better.
        dial: the place of this command, where it is one of several that call each other.
        is_dry: nothing will be started; the plan alone is wanted.
    """

    parallel: ParallelConfig
    launch_id: str
    devices: tuple[str, ...]
    log_dir: str | None
    is_quiet: bool
    given: frozenset[str] = frozenset()
    device_spec: str = "auto"
    hosts: tuple[Host, ...] | None = None
    nodes: NodesConfig = field(default_factory=NodesConfig)
    lease_s: float = Deadlines.lease_s
    report: str | None = None
    trace: str | None = None
    timeout_s: float = 0.0
    tail: int = TAIL_LINES
    has_prefix: bool = True
    shown: ShownStreams = field(default_factory=ShownStreams)
    is_verbose: bool = False
    launcher_log: str | None = None
    notes: tuple[str, ...] = ()
    dial: DialPlace | None = None
    is_dry: bool = False

    @property
    def placement(self) -> str | tuple[str, ...]:
        """What ``zspmd.launch`` takes as its ``devices``."""
        return self.devices if self.hosts is None and self.dial is None else self.device_spec


@dataclass(frozen=True)
class ScriptOptions:
    """A launch of ranks that execute ``argv``.

    Attributes:
        cwd: where they run; ``script`` is the file's path there, empty for a module or command.
        world_size: None where the hosts have yet to tell how many GPUs they have.
        devices: "cpu" or "cuda:<index>" by rank; ``visible_devices`` is their CUDA_VISIBLE_DEVICES, None where it stays as it is. With
            ``hosts`` both follow from ``device_spec``, once the nodes are known.
        environment: variables to set in every rank, beside the launch's facts.
        run_id: what ranks find as TORCHELASTIC_RUN_ID.
        master_addr: an IP address; with ``hosts`` it is empty for that of node 0. ``master_port`` is 0 for one that follows from the
            launch id.
        log_dir: where each rank's streams go, raw; None for nowhere. ``launcher_log`` is a file for the launcher's own lines.
        shown: whose lines are shown; ``has_prefix`` is false for none before them, ``has_timestamps`` puts the time there too.
        tail: how many lines are shown of a rank that has failed.
        grace_s: how long ranks may take to end after a first Ctrl-C.
        abort_grace_s: from SIGTERM to SIGKILL for the other ranks when one has failed.
        timeout_s: how long the launch may take; 0 for ever.
        hosts: None for this machine alone; ``slots`` is the number of ranks on each, where the command line says so.
        lease_s: for how long a node may be silent.
        manual: the place of this node, where its command is one of several.
        is_external: this process is itself a rank of another launcher.
        report: where to write how the launch ended; None for nowhere.
        dial: the place of this command, where it is one of several that call each other.
    """

    argv: tuple[str, ...]
    cwd: str
    world_size: int | None
    launch_id: str
    devices: tuple[str, ...]
    visible_devices: str | None
    environment: dict[str, str]
    run_id: str
    master_addr: str
    master_port: int
    log_dir: str | None
    has_prefix: bool
    grace_s: float
    abort_grace_s: float
    is_quiet: bool
    script: str = ""
    device_spec: str = "auto"
    shown: ShownStreams = field(default_factory=ShownStreams)
    has_timestamps: bool = False
    tail: int = TAIL_LINES
    timeout_s: float = 0.0
    hosts: tuple[Host, ...] | None = None
    slots: int | None = None
    nodes: NodesConfig = field(default_factory=NodesConfig)
    lease_s: float = Deadlines.lease_s
    manual: ManualNode | None = None
    is_external: bool = False
    is_launch_id_given: bool = False
    report: str | None = None
    launcher_log: str | None = None
    is_verbose: bool = False
    notes: tuple[str, ...] = ()
    dial: DialPlace | None = None
