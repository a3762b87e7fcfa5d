"""One run, from a seed to what it has shown.

The driver is the real one, from ``WorkerGroup`` to ``NodeSupervisor``, and so are the ends of its sockets and the ranks' loops. What it
meets is not, and takes no time:

    options    what a seed stands for                       ranks, work    processes, and what they do in a step
    world      the clock and what is due                    agent          who starts and ends them
    loop       the event loop                               launch         puts it in the place of the real parts
    sockets    ZeroMQ's calls and edges                     callers        tasks that use the group
    network    delays, losses, cuts                         checks         what must hold, whatever goes wrong

What is not in it: what a torn or garbled value would be read as (the decoders' tests), CURVE, several hosts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
from collections import Counter
from dataclasses import dataclass

from zspmd.config import ParallelConfig
from zspmd.errors import ZspmdError
from zspmd.runtime.driver.group import WorkerGroup
from zspmd.runtime.driver.launching import GroupConfig

from .callers import Callers
from .checks import Checks
from .launch import SimulatedLaunch, simulated
from .options import Options, draw_options
from .world import START_S, World

LONGEST_RUN_S = 600.0
AFTERWARDS_S = 15.0  # a timer that rings then is left over


@dataclass(frozen=True)
class Outcome:
    """What a run has shown."""

    options: Options
    violations: list[str]
    reached: Counter[str]
    trace: list[tuple[float, str]]

    @property
    def digest(self) -> str:
        """The same for two runs that were the same."""
        return hashlib.sha256(repr([(round(at, 7), what) for at, what in self.trace]).encode()).hexdigest()[:16]


def simulate(seed: int) -> Outcome:
    """Run a seed to its end, or until something does not hold."""
    options = draw_options(seed)
    world = World(seed)
    launch = SimulatedLaunch(world, options)
    launch.checks = Checks(launch)
    with simulated(launch), contextlib.redirect_stderr(io.StringIO()):
        try:
            launch.loop.run(_main(launch), until=START_S + LONGEST_RUN_S)
        except TimeoutError as error:
            world.violate(str(error))
        except Exception as error:
            world.violate(f"{error!r} went through everything")
    return Outcome(options, world.violations, world.reached, world.trace)


async def _main(launch: SimulatedLaunch) -> None:
    options = launch.options
    group = WorkerGroup(
        GroupConfig(
            worker="simulated:Worker",
            main_path="",
            worker_args={},
            parallel=ParallelConfig(tp=options.num_ranks),
            output_ranks=options.output_ranks,
            window=options.window,
            launch_id="simulated",
            devices=("cpu",) * options.num_ranks,
            deadlines=options.deadlines,
            on_log=lambda rank, stream, line: None,
            on_progress=lambda rank, done, total, what: None,
            recorder=launch.checks,
        )
    )
    launch.checks.watch(group)
    reading = asyncio.ensure_future(_read_events(launch, group))
    if await _start(launch, group):
        callers = [asyncio.ensure_future(Callers(launch, group).run(caller)) for caller in options.callers]
        await asyncio.wait(callers, timeout=options.close_s)
        await _close(launch, group)
        await asyncio.gather(*callers)
    await reading
    await asyncio.sleep(AFTERWARDS_S)
    launch.checks.ended(group)


async def _start(launch: SimulatedLaunch, group: WorkerGroup) -> bool:
    """Start the group, cancelled where the options say so; returns whether it is ready."""
    world, started = launch.world, launch.world.now
    starting = asyncio.ensure_future(group.start())
    if launch.options.cancel_start_s is not None:
        asyncio.get_running_loop().call_later(launch.options.cancel_start_s, starting.cancel)
    try:
        await starting
    except asyncio.CancelledError:
        world.reach("start_cancelled")
    except ZspmdError as error:
        launch.checks.start_failed(error, world.now - started)
    else:
        world.reach("ready")
    deadlines = launch.options.deadlines
    launch.checks.within("start", started, deadlines.ready_s + 2 * deadlines.kill_s + 5.0)
    if not world.reached["ready"]:
        launch.checks.closing_at = world.now
    return bool(world.reached["ready"])


async def _close(launch: SimulatedLaunch, group: WorkerGroup) -> None:
    """Close the group, by several tasks at once where the options say so, and once more."""
    world, deadlines, started = launch.world, launch.options.deadlines, launch.world.now
    launch.checks.closing_at = started
    closing = [asyncio.ensure_future(group.aclose(abort=launch.options.abort)) for _ in range(launch.options.num_closers)]
    errors = {error for error in await asyncio.gather(*closing, return_exceptions=True) if error is not None}
    launch.checks.within("closing", started, 2 * deadlines.drain_s + 2 * deadlines.kill_s + 1.0)
    for error in errors:
        launch.checks.close_raised(error)
    world.reach("closed")
    with contextlib.suppress(ZspmdError):
        await group.aclose()


async def _read_events(launch: SimulatedLaunch, group: WorkerGroup) -> None:
    kinds = []
    async for event in group.events():
        kinds.append(event.kind)
        launch.world.reach(f"event_{event.kind}")
    if kinds[-1] != "closed":
        launch.world.violate(f"the last event is {kinds[-1]!r}")
