"""Replay a recording (``launch(record=...)``) on fresh ranks and compare every answer with the recorded one; with --rank, one rank alone.

Exit code 0 if all that was recorded came out again, bit for bit, 1 if not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import deque
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from ...errors import TopologyError, WorkerRaisedError, ZspmdError
from ...transport.codec import TORCH, AnyArray, register_bridge
from ...transport.comparison import Comparison
from ...transport.frames import Buffer, ResultFrame, StepKind
from ...transport.recorded_launch import RecordedFault, RecordedLaunch, Recording, read_call, read_value
from ..driver.group import WorkerGroup
from ..driver.launching import GroupConfig
from ..driver.pending import PendingReply
from ..driver.recording import describe_fault
from ..launch.command.console import RankConsole
from ..launch.plan import plan_local
from ..launch.ports import first_candidate
from ..launch.run_directory import run_directory_path

if TYPE_CHECKING:
    from ..launch.cli import LaunchOptions

USES = ("logs",)

_MEASUREMENTS = {  # by worker: the machine's free memory, and with speculation the times of a step
    "zspmd.workers.model_worker:ModelWorker": ("kv_capacity", "answer[4][1]", "answer[4][2]"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the program's arguments."""
    parser.add_argument("file", metavar="FILE", help="the recording: what launch(record=FILE) was told")
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="WHAT",
        help="do not compare what calls of a method answer, such as a time, or what stands at a place in the answers of steps, such as "
        "'answer[4][1]', as the report names it; may be repeated",
    )
    parser.add_argument("--rank", type=int, metavar="R", help="replay this rank alone, in this terminal: for a debugger or a profiler")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Read and check the whole recording; returns what it is of."""
    recording = Recording.open(os.path.abspath(arguments.file))
    launch = recording.launch
    if arguments.rank is not None and not 0 <= arguments.rank < launch.parallel.world_size:
        raise TopologyError(f"--rank is {arguments.rank}; the recording has ranks 0 to {launch.parallel.world_size - 1}")
    _check_options(launch, options)
    arguments.recording = recording
    return f"{launch.worker} on {launch.parallel.world_size} ranks, {recording.num_frames} steps and calls"


def run(arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]:
    """Return the replay of all ranks; that of one takes this process over, so that a debugger has the terminal, and does not return."""
    recording: Recording = arguments.recording
    if options.log_dir is not None:
        options = replace(options, log_dir=os.path.abspath(options.log_dir))
    _take_place(recording.launch)
    ignored = (*arguments.ignore, *_MEASUREMENTS.get(recording.launch.worker, ()))
    if arguments.rank is not None:
        _become_rank(recording, arguments.rank, ignored)
    return _replay(recording, ignored, options)


class ReplayedGroup:
    """What is told of a group that replays: compares answers and the first cause with those of the recording."""

    path = ""

    def __init__(self, recording: Recording, ignored: Collection[str]) -> None:
        self._recording = recording
        self.comparison = Comparison(recording, range(recording.launch.parallel.world_size), ignored)
        self.fault: RecordedFault | None = None
        self.is_started = False

    def starting(self, config: GroupConfig, epoch: int, worker_args: tuple[bytes, Sequence[Buffer]], *, omp_num_threads: str) -> None:
        """Note that there will be something to report."""
        self.is_started = True

    def published(self, kind: StepKind, seq: int, body: Buffer, buffers: Sequence[Buffer]) -> None:
        """Frames come from the recording."""

    def answered(self, frame: ResultFrame) -> None:
        """Compare an answer."""
        self.comparison.answered(frame.rank, frame.seq, frame.kind, frame.body, frame.buffers)

    def failed(self, error: ZspmdError) -> None:
        """Keep the first cause for the report."""
        self.fault = describe_fault(error)

    def close(self) -> None:
        """Look for what has not been answered, unless the launch has failed as it was recorded."""
        if self.fault is None or self.fault != self._recording.fault:
            self.comparison.finish()

    @property
    def is_equal(self) -> bool:
        return self.comparison.is_equal and self.fault == self._recording.fault


async def _replay(recording: Recording, ignored: Collection[str], options: LaunchOptions) -> int:
    """Publish what was published, in its order, and report what came of it."""
    launch = recording.launch
    register_bridge(TORCH, UntouchedTensors())
    replayed = ReplayedGroup(recording, ignored)
    other: ZspmdError | None = None
    with RankConsole(launch.parallel.world_size, is_quiet=options.is_quiet) as console:
        console.say(f"replays {launch.launch_id}: {recording.num_frames} steps and calls on {', '.join(launch.devices)}")
        group = WorkerGroup(
            GroupConfig(
                worker=launch.worker,
                main_path=launch.main_path,
                worker_args=recording.worker_args(),
                parallel=launch.parallel,
                output_ranks=launch.output_ranks,
                window=launch.window,
                launch_id=options.launch_id if "launch-id" in options.given else launch.launch_id,  # which the worker may depend on
                devices=launch.devices,
                deadlines=launch.deadlines,
                log_dir=options.log_dir,
                preload=launch.preload,
                start_method=launch.start_method,
                communicator=launch.communicator,
                on_log=console.on_log,
                on_progress=console.on_progress,
                recorder=replayed,
            )
        )
        try:
            async with group:
                console.finish_loading()
                await _publish(group, recording, replayed)
        except ZspmdError as error:
            other = error if replayed.fault is None else None
    if replayed.is_started:
        print("\n".join(_report(recording, replayed)), flush=True)
    if other is not None:
        raise other
    return 0 if replayed.is_equal else 1


async def _publish(group: WorkerGroup, recording: Recording, replayed: ReplayedGroup) -> None:
    """Publish every frame and wait for the answers; ends with the error of a rank that fails."""
    limit = recording.launch.collective_s  # what a step may take was its caller's to say; a rank gives up no sooner than this
    under_way: deque[PendingReply] = deque()
    for frame in recording.frames():
        if frame.code == StepKind.STEP:
            under_way.append(await group.submit(read_value(frame), timeout_s=limit))
        else:
            method, args, kwargs, ranks = read_call(frame)
            try:
                await group.call(method, *args, ranks=ranks, timeout_s=limit, **kwargs)
            except WorkerRaisedError:  # what a call raises is its answer, unless it is the end of the group
                if replayed.fault is not None:
                    raise
        while under_way and under_way[0].is_done:
            under_way.popleft()
    for pending in under_way:
        await pending.wait_done()


def _report(recording: Recording, replayed: ReplayedGroup) -> list[str]:
    lines = replayed.comparison.table()
    lines += [f"note: {note}" for note in recording.notes]
    if replayed.fault is not None and replayed.fault == recording.fault:
        lines.append(f"failed as recorded: {recording.fault}")
    elif recording.fault is not None or replayed.fault is not None:
        lines.append(f"recorded: {recording.fault or 'no failure'}")
        lines.append(f"replayed: {replayed.fault or 'no failure'}")
    lines.append("equal" if replayed.is_equal else "different")
    return lines


def _check_options(launch: RecordedLaunch, options: LaunchOptions) -> None:
    """Refuse what the command line says otherwise than the recording, whose launch it is."""
    recorded, asked = (
        {"num-ranks": parallel.world_size, **asdict(parallel), "devices": ",".join(devices)}
        for parallel, devices in ((launch.parallel, launch.devices), (options.parallel, options.devices))
    )
    for name, value in recorded.items():
        if name in options.given and asked[name] != value:
            raise TopologyError(f"--{name} is {asked[name]}, the recording has {value}; leave it out, the recording decides")


def _take_place(launch: RecordedLaunch) -> None:
    """Make this process's directory, import path and thread count those of the recording's driver; ranks get them from it."""
    try:
        os.chdir(launch.cwd)
    except OSError as error:
        print(f"zspmd-run: replays in {os.getcwd()}, since the recording's directory is not there: {error}", file=sys.stderr)
    sys.path += [entry for entry in launch.sys_path if entry not in sys.path]
    os.environ["OMP_NUM_THREADS"] = launch.omp_num_threads  # sums of floats depend on it


def _become_rank(recording: Recording, rank: int, ignored: Sequence[str]) -> None:
    launch = recording.launch
    plan = plan_local(
        launch_id=launch.launch_id,
        world_size=launch.parallel.world_size,
        master_port=first_candidate(launch.launch_id, "master"),
        run_directory=str(run_directory_path(launch.launch_id)),
        devices=launch.devices,
    )
    environment = plan.rank_environment(rank)
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    sys.stdout.flush()
    sys.stderr.flush()
    argv = [sys.executable, "-m", "zspmd.workers.replay", recording.path, "--rank", str(rank)]
    os.execve(sys.executable, [*argv, *(f"--ignore={method}" for method in ignored)], environment)


class UntouchedTensor:
    """A torch tensor's bytes on their way through a process without torch."""

    def __init__(self, array: AnyArray) -> None:
        self.array = array


class UntouchedTensors:
    """A ``TensorBridge`` that sends tensors on as they came: ranks get tensors again, not arrays."""

    def matches(self, value: object) -> bool:
        """Whether it is one of these."""
        return isinstance(value, UntouchedTensor)

    def to_array(self, tensor: UntouchedTensor) -> AnyArray:
        """Return its bytes as an array."""
        return tensor.array

    def from_array(self, array: AnyArray) -> UntouchedTensor:
        """Keep the array for ``to_array``."""
        return UntouchedTensor(array)
