"""How long a start takes, by ranks: of a group with an empty worker, of an engine, and of a whole ``zspmd-run generate``.

A group's phases count from ``launch``, an engine's from its ``start``: when this node's agent serves, the last rank is forked (from a
process that has imported what ranks need: torch, for an engine), is connected, has read its weights, all are ready, the KV pool is made,
and the first token is there. The program's figure is from its exec to the first text that it writes.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .... import process
from ....config import EngineConfig, ParallelConfig, SamplingParams
from ....errors import ConfigError, LaunchError
from ....model_config import check_tensor_parallel, read_model_config
from ...driver.launching import launch
from ...engine.engine import Engine
from ...engine.start_times import Moment, StartTimes
from .engine import add_model_arguments, check_model, open_model
from .report import Report
from .rows import Row

if TYPE_CHECKING:
    from ...launch.cli import LaunchOptions

TURNS = 3
RANKS = [1, 2]
KINDS = ("empty", "engine", "program")
OURS = "zspmd"
_WORKER = "zspmd.workers.worker:Worker"
_BEGIN = "engine starts"
_MAX_RANKS = 256
_PROMPT = "a"
_PROGRAM_S = 120.0
_END_S = 20.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the benchmark's options."""
    parser.add_argument("--ranks", type=int, nargs="+", metavar="N", help="(1 2)")
    parser.add_argument("--of", nargs="+", choices=KINDS, default=list(KINDS), help="what is started (all three)")
    add_model_arguments(parser)


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Check the options."""
    arguments.ranks = arguments.ranks or RANKS
    for ranks in arguments.ranks:
        if not 1 <= ranks <= _MAX_RANKS:
            raise ConfigError(f"--ranks is {ranks}; it must be from 1 to {_MAX_RANKS}")
    name = check_model(arguments)
    return f"{', '.join(arguments.of)}; {', '.join(map(str, arguments.ranks))} ranks, {name}, {arguments.turns} turns"


async def measure(arguments: argparse.Namespace, options: LaunchOptions, report: Report) -> None:
    """Start everything ``--turns`` times, in turns."""
    report.title, report.x_axis, report.others = "From nothing to ready", "ranks", ("torch",)
    with tempfile.TemporaryDirectory(prefix="zspmd-bench-") as scratch:
        model = open_model(arguments.model, arguments.preset, Path(scratch))
        for ranks in arguments.ranks:
            check_tensor_parallel(read_model_config(model), ranks)
            phases: dict[tuple[str, str], list[list[float]]] = {}
            for number in range(arguments.turns):
                report.say(f"{ranks} ranks, turn {number + 1} of {arguments.turns}")
                for kind in arguments.of:
                    for what, after_s in (await _start(kind, ranks, model)).items():
                        phases.setdefault((kind, what), []).append([after_s])
            for (kind, what), turns in phases.items():
                report.add(Row({"ranks": ranks, "of": kind, "until": what}, OURS, "s", turns))


async def _start(kind: str, ranks: int, model: Path) -> dict[str, float]:
    """Return what was done, and how long after the beginning the last rank had done it."""
    if kind == "program":
        return {"first text": await _run_program(ranks, model)}
    return await (_start_engine(ranks, model) if kind == "engine" else _start_group(ranks))


async def _start_group(ranks: int) -> dict[str, float]:
    times = StartTimes()
    times.mark(_BEGIN)
    async with launch(_WORKER, world_size=ranks, devices="cpu", preload=()) as group:
        await times.add_events(group.events())
    return _phases(times.moments())


async def _start_engine(ranks: int, model: Path) -> dict[str, float]:
    config = EngineConfig(num_blocks=64, max_model_len=256)
    async with Engine(model, parallel=ParallelConfig(tp=ranks), config=config, devices="cpu") as engine:
        async for _ in engine.generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True)):
            pass
        return _phases(engine.start_times())


def _phases(moments: tuple[Moment, ...]) -> dict[str, float]:
    begin_s = next(moment.at_s for moment in moments if moment.what == _BEGIN)
    return {moment.what: moment.at_s - begin_s for moment in moments if moment.what != _BEGIN}


async def _run_program(ranks: int, model: Path) -> float:
    """Return the seconds from the start of ``zspmd-run generate`` to the first byte on its standard output.

    Raises:
        LaunchError: it wrote nothing, or did not end.
    """
    argv = [sys.executable, "-m", "zspmd.runtime.launch.cli", "--tp", str(ranks), "--devices", "cpu", "--quiet"]
    argv += ["generate", "--model", str(model), "--max-tokens", "2", "--num-blocks", "64", "--max-model-len", "256", _PROMPT]
    bound = [sys.executable, "-I", "-S", str(process.__file__), str(os.getpid()), os.getcwd(), *argv]
    pipe = asyncio.subprocess.PIPE
    began_s = time.perf_counter()
    running = await asyncio.create_subprocess_exec(*bound, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, start_new_session=True)
    assert running.stdout is not None, "it was started with a pipe"
    try:
        first = await asyncio.wait_for(running.stdout.read(1), _PROGRAM_S)
        elapsed_s = time.perf_counter() - began_s
        await asyncio.wait_for(running.communicate(), _END_S)
    except asyncio.TimeoutError as error:
        raise LaunchError(f"{' '.join(argv)} wrote nothing within {_PROGRAM_S:g} s, or did not end") from error
    finally:
        if running.returncode is None:
            running.terminate()  # it ends its ranks, which its agent does too where it cannot
            await running.wait()
    if not first:
        raise LaunchError(f"{' '.join(argv)} ended with code {running.returncode} and wrote nothing; what it said is above")
    return elapsed_s
