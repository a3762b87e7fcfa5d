"""All-reduce and all-gather of float32 by backend, size and number of ranks.

A group for each backend, on the same ranks' cores; they take turns. The size is that of one rank's tensor. ``nccl`` is measured where there
are as many GPUs as ranks.
"""

from __future__ import annotations

import argparse
import itertools
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from ....backends import choose_communicator
from ....errors import ConfigError, TopologyError
from ...driver.group import WorkerGroup
from ...driver.launching import launch
from ...launch.devices import num_cuda_devices
from .report import Report
from .rows import Row, TakeTurn, Value, take_turns
from .sizes import read_size, show_size

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

TURNS = 12
RANKS = [2, 4]
SIZES = [2 << 10, 64 << 10, 1 << 20]
OPERATIONS = ("all-reduce", "all-gather")
BACKENDS = ("shm", "gloo", "nccl", "nccl-raw")
_WORKER = "zspmd.workers.collective_timer:CollectiveTimer"
_MAX_RANKS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="(2 4)")
    parser.add_argument("--size", type=read_size, nargs="+", default=SIZES, metavar="SIZE", help="of one rank's tensor (2K 64K 1M)")
    parser.add_argument("--operation", choices=OPERATIONS, nargs="+", default=list(OPERATIONS), help="(both)")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="the first is the one to compare with (shm gloo, nccl on GPUs)")
    parser.add_argument("--calls", type=int, default=200, metavar="N", help="of a turn at most (200)")
    parser.add_argument("--turn-s", type=float, default=0.2, metavar="S", help="seconds of a turn at most (0.2)")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check the options."""
    arguments.ranks = arguments.ranks or RANKS
    for ranks in arguments.ranks:
        if not 2 <= ranks <= _MAX_RANKS:
            raise ConfigError(f"--ranks is {ranks}; it must be from 2 to {_MAX_RANKS}")
    for size in arguments.size:
        if size % 4:
            raise ConfigError(f"--size is {size}; it must be a multiple of 4, since the tensors are float32")
    if not 1 <= arguments.calls <= 1_000_000 or not 0 < arguments.turn_s <= 60:
        raise ConfigError(
            f"--calls is {arguments.calls} and --turn-s {arguments.turn_s:g}; they must be from 1 to 1000000, and above 0 and at most 60"
        )
    arguments.backend = arguments.backend or ["shm", "gloo", *(["nccl"] if num_cuda_devices() >= min(arguments.ranks) else [])]
    for backend in arguments.backend:
        choose_communicator(backend, [_device(backend)])  # refuses one that is not there
    return f"{', '.join(arguments.backend)} with {', '.join(map(str, arguments.ranks))} ranks"


async def measure(arguments: argparse.Namespace, options: LaunchOptions, report: Report) -> None:
    """Measure each number of ranks with groups of its own."""
    report.baseline, report.title, report.x_axis = arguments.backend[0], "Collectives", "ranks"
    for ranks in arguments.ranks:
        async with AsyncExitStack() as stack:
            report.say(f"{ranks} ranks: starting")
            groups = {}
            for backend in dict.fromkeys(arguments.backend):
                try:
                    group = launch(_WORKER, world_size=ranks, devices=_device(backend), communicator=backend)
                except TopologyError as error:
                    report.note(f"left out with {ranks} ranks: {backend}: {error}")
                    continue
                groups[backend] = await stack.enter_async_context(group)
            for operation, size in itertools.product(arguments.operation, arguments.size):
                report.say(f"{ranks} ranks, {operation} of {show_size(size)}")
                turns = {backend: _turn(group, operation, size, arguments) for backend, group in groups.items()}
                case: dict[str, Value] = {"ranks": ranks, "operation": operation, "size": show_size(size)}
                for backend, samples in (await take_turns(turns, arguments.turns)).items():
                    report.add(Row(case, backend, "us", samples))


def _turn(group: WorkerGroup, operation: str, size: int, arguments: argparse.Namespace) -> TakeTurn:
    async def take() -> list[float]:
        told = await group.call("time_collective", operation, size, arguments.calls, arguments.turn_s)
        return list(told[0])

    return take


def _device(backend: str) -> str:
    return "cuda" if backend.startswith("nccl") else "cpu"
