"""``zspmd.launch``: from what a user says to a worker group that is ready to be entered."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...backends import choose_communicator
from ...config import Deadlines, NodesConfig, ParallelConfig, TraceConfig
from ...errors import ConfigError, TopologyError
from ...transport.security import check_bind_address
from ...transport.trace_spans import NO_TRACE, Trace
from ..launch.devices import detect_devices
from ..launch.hosts.host import Host as Host
from ..launch.launch_id import check_launch_id, generate_launch_id
from .recording import FileRecorder, GroupRecorder, check_recording_path

if TYPE_CHECKING:
    from ..launch.dial.dial_place import DialPlace
    from .group import WorkerGroup
    from .tracing import GroupTracer

MAX_WINDOW = 256
START_METHODS = ("fork", "spawn")
LAUNCHERS = ("agents", "external")
OnLog = Callable[[int, str, str], None]
OnProgress = Callable[[int, int, int, str], None]


@dataclass(frozen=True)
class GroupConfig:
    """Everything that a worker group needs to know before it starts; made by ``launch``."""

    worker: str
    main_path: str
    worker_args: Mapping[str, Any]
    parallel: ParallelConfig
    output_ranks: tuple[int, ...]
    window: int
    launch_id: str
    devices: str | tuple[str, ...]  # by rank, but with hosts as the user said it
    deadlines: Deadlines = field(default_factory=Deadlines)
    log_dir: str | None = None
    preload: tuple[str, ...] = ()
    start_method: str = "fork"
    communicator: str = "auto"
    on_log: OnLog | None = None
    on_progress: OnProgress | None = None
    recorder: GroupRecorder | None = None
    bind: str | None = None
    hosts: tuple[Host, ...] | None = None
    nodes: NodesConfig = field(default_factory=NodesConfig)
    dial: DialPlace | None = None
    tracer: GroupTracer | None = None

    @property
    def trace(self) -> Trace:
        """Where the driver's program writes spans of its own."""
        return NO_TRACE if self.tracer is None else self.tracer.trace


def launch(
    worker: type | str,
    *,
    world_size: int | None = None,
    parallel: ParallelConfig | None = None,
    worker_args: Mapping[str, Any] | None = None,
    output_ranks: Sequence[int] | str = (0,),
    window: int = 4,
    launch_id: str | None = None,
    devices: str | Sequence[str] = "auto",
    deadlines: Deadlines | None = None,
    log_dir: str | None = None,
    preload: Sequence[str] = ("torch",),
    start_method: str = "fork",
    communicator: str = "auto",
    on_log: OnLog | None = None,
    on_progress: OnProgress | None = None,
    record: str | os.PathLike[str] | None = None,
    trace: str | os.PathLike[str] | TraceConfig | None = None,
    bind: str | None = None,
    hosts: str | os.PathLike[str] | Sequence[str | Host] | None = None,
    nodes: NodesConfig | None = None,
    launcher: str | DialPlace = "agents",
) -> WorkerGroup:
    """Return a worker group; ``async with`` it to start the ranks and to end them.

    Args:
        worker: a ``zspmd.Worker`` subclass that ranks can import, or its ``"module:qualname"``; one in the main script works too.
        world_size: number of ranks; all of them on the tp axis unless ``parallel`` says otherwise.
        parallel: sizes of the mesh axes; their product is the world size.
        worker_args: keyword arguments of ``Worker.setup``; plain values, arrays and tensors.
        output_ranks: the ranks whose ``step`` results come back, or "all".
        window: steps and calls that may be in flight; bounds memory on both sides.
        launch_id: a name for this launch, unique on the host while it lives; made up if None.
        devices: "auto", "cpu", "cuda", or one device a rank, such as "cuda:2,cuda:3".
        deadlines: how long each wait may last.
        log_dir: a directory for each rank's raw output; None keeps only the last lines.
        preload: modules imported once before the ranks are forked; leave torch out for workers that do not use it.
        start_method: "fork" (milliseconds a rank) or "spawn" (a fresh interpreter each, for libraries that cannot be forked).
        communicator: backend of the collectives: "shm" (CPUs of one machine), "gloo" (CPUs), "nccl" or "nccl-raw" (GPUs), a vendor's,
            or "auto".
        on_log: called with (rank, stream, line) for each line a rank prints; None prints it to stderr with the rank before it.
        on_progress: called with (rank, done, total, what) as ranks report the progress of their set-up.
        record: a file to make, with all that passes between the driver and its ranks, for ``zspmd-run replay``; each rank writes the
            results of its collectives beside it, to ``<record>.r00000`` and so on. As large as all of these together. On one node only.
        trace: a file to make, with the timeline of the driver and all ranks, as JSON for ui.perfetto.dev; ``docs/tracing.md`` says how to
            read it. A ``TraceConfig`` says too how much is kept.
        bind: the IP address of this host at which the driver's sockets listen on TCP, with CURVE, and to which the ranks connect; None
            keeps to sockets in the run directory, and opens no port at all. With ``hosts``, the driver's address; None finds one.
        hosts: the machines that the ranks run on, in rank order: a hostfile's path, or its entries ("node1 slots=4"). Those of this
            machine connect by sockets in the run directory, the others by TCP with CURVE. None runs all of them here.
        nodes: how the others are reached.
        launcher: "agents" starts the ranks; "external" joins what torchrun, mpirun or srun has started, one process for each rank, all of
            which come here. The group of rank 0's drives; in the others ``start`` serves it until the end of the launch and then raises
            SystemExit, so that the program ends there. ``bind`` is rank 0's address where that is on another machine and its launcher
            does not tell, and several machines need ZSPMD_SECRET; see docs/external.md.

    Raises:
        ConfigError, TopologyError: an argument out of its range; nothing was started.
        HostfileError: entries that cannot be read, all of them.
        InsecureEndpointError: ``bind`` means more than one address.
    """
    from .group import WorkerGroup

    place = None
    if not isinstance(launcher, str):
        place, launch_id = launcher, launcher.launch_id
    else:
        _check_choice("launcher", launcher, LAUNCHERS)
    if launcher != "agents" and hosts is not None:
        raise ConfigError(f"hosts and launcher={launcher!r} are given; nodes that call in are where they are: leave hosts out")
    if launcher == "external":
        from .external_launch import find_place  # what other launches need not wait for

        asked = world_size if parallel is None else parallel.world_size
        place = find_place(world_size=asked, launch_id=launch_id, master_addr=bind, lease_s=(deadlines or Deadlines()).lease_s)
        world_size, launch_id = place.num_nodes, place.launch_id
    sizes = _parallel(world_size, parallel)
    reference, main_path = worker_reference(worker)
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= MAX_WINDOW:
        raise ConfigError(f"window is {window!r}; it must be a whole number from 1 to {MAX_WINDOW}")
    _check_choice("start_method", start_method, START_METHODS)
    if worker_args is not None and not isinstance(worker_args, Mapping):
        raise ConfigError(f"worker_args is a {type(worker_args).__name__}; give a dict of setup's keyword arguments")
    if isinstance(preload, str):
        raise ConfigError(f"preload is the text {preload!r}; give a list of module names")
    machines = None if hosts is None else read_hosts(hosts, nodes or NodesConfig())
    is_spread = machines is not None or place is not None
    if is_spread and record is not None:
        what = "launcher" if machines is None else "hosts"
        raise ConfigError(f"record and {what} are given, but a recording is of ranks on one node; leave one of them out")
    places = devices if is_spread else detect_devices(devices, sizes.world_size)
    return WorkerGroup(
        GroupConfig(
            worker=reference,
            main_path=main_path,
            worker_args=dict(worker_args or {}),
            parallel=sizes,
            output_ranks=check_ranks("output_ranks", output_ranks, sizes.world_size),
            window=window,
            launch_id=generate_launch_id() if launch_id is None else check_launch_id(launch_id),
            devices=places if isinstance(places, str) else tuple(places),
            deadlines=deadlines or Deadlines(),
            log_dir=None if log_dir is None else os.path.abspath(log_dir),
            preload=tuple(preload),
            start_method=start_method,
            communicator=communicator if is_spread else choose_communicator(communicator, places),
            on_log=on_log,
            on_progress=on_progress,
            recorder=None if record is None else FileRecorder(check_recording_path(record)),
            bind=None if bind is None or place is not None else check_bind_address(bind),
            hosts=machines,
            nodes=nodes or NodesConfig(),
            dial=place,
            tracer=None if trace is None or (place is not None and not place.is_driver) else _make_tracer(trace),
        )
    )


def _make_tracer(trace: str | os.PathLike[str] | TraceConfig) -> GroupTracer:
    from .trace_file import check_trace_path  # what launches without a trace need not wait for
    from .tracing import GroupTracer

    config = trace if isinstance(trace, TraceConfig) else TraceConfig(trace)
    return GroupTracer(config, check_trace_path(config.path))


def read_hosts(hosts: str | os.PathLike[str] | Sequence[str | Host], config: NodesConfig) -> tuple[Host, ...]:
    """Return the hosts of a file or list that take part.

    Raises:
        HostfileError: entries that cannot be read, all of them.
        ConfigError: there are none.
    """
    from ..launch.hosts.host_lists import parse_hosts
    from ..launch.hosts.host_selection import select_hosts
    from ..launch.hosts.hostfile import read_hostfile

    notes: list[str] = []
    if isinstance(hosts, (str, os.PathLike)):
        found = read_hostfile(os.fspath(hosts), notes=notes)
    else:
        found = parse_hosts(list(hosts), notes=notes)
    for note in notes:
        print(f"zspmd: {note}", file=sys.stderr)
    return tuple(select_hosts(found, include=config.include, exclude=config.exclude, num_nodes=config.num_nodes))


def worker_reference(worker: type | str) -> tuple[str, str]:
    """Return ``module:qualname`` of a worker class and, for one of the main script, the script's path (else "").

    Raises:
        ConfigError: a class that no other process could import.
    """
    if isinstance(worker, str):
        module, _, qualname = worker.partition(":")
        if not module or not qualname:
            raise ConfigError(f"worker is {worker!r}; write it as 'module:ClassName'")
    elif isinstance(worker, type):
        module, qualname = worker.__module__, worker.__qualname__
        if "<locals>" in qualname:
            raise ConfigError(f"worker {qualname} is defined inside a function; move it to the top level of a module")
    else:
        raise ConfigError(f"worker is {worker!r}; give a zspmd.Worker subclass or 'module:ClassName'")
    if module == "__zspmd_main__":
        raise ConfigError("this script launches ranks when a rank imports it; put the launch under: if __name__ == '__main__':")
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if module == "__main__" and spec is not None:  # python -m: importable by its own name, relative imports and all
        module = spec.name
    if module != "__main__":
        return f"{module}:{qualname}", ""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None:
        raise ConfigError(f"worker {qualname} is defined at a prompt, where ranks cannot import it; put it into a file")
    return f"{module}:{qualname}", str(path)


def check_ranks(name: str, ranks: Sequence[int] | str, world_size: int) -> tuple[int, ...]:
    """Return ranks as a tuple without repeats; "all" stands for every rank.

    Raises:
        TopologyError: none, a repeat, or one outside the world.
    """
    if isinstance(ranks, str):
        if ranks != "all":
            raise TopologyError(f"{name} is {ranks!r}; give a list of ranks or 'all'")
        return tuple(range(world_size))
    chosen = tuple(ranks)
    if not chosen or len(set(chosen)) != len(chosen) or not all(type(r) is int and 0 <= r < world_size for r in chosen):
        raise TopologyError(f"{name} is {list(chosen)}; it must name one or more different ranks from 0 to {world_size - 1}")
    return chosen


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}")


def _parallel(world_size: int | None, parallel: ParallelConfig | None) -> ParallelConfig:
    if world_size is not None and (isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1):
        raise TopologyError(f"world_size is {world_size!r}; it must be a whole number of at least 1")
    if parallel is None:
        return ParallelConfig(tp=1 if world_size is None else world_size)
    if world_size is not None and world_size != parallel.world_size:
        raise TopologyError(
            f"world_size is {world_size}, but dp {parallel.dp} x pp {parallel.pp} x tp {parallel.tp} makes {parallel.world_size}; "
            "leave world_size out or make them agree"
        )
    return parallel
