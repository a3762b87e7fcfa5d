"""The side of zspmd: a worker group whose ranks answer each step at once. Started by ``bench step``, told its turns by ``side_process``."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import uvloop

from .....config import NodesConfig
from ....driver.group import WorkerGroup
from ....driver.launching import launch
from ....driver.pending import PendingReply
from ....launch.hosts.host import Host
from ....launch.hosts.own_host import source_address
from ..side_server import answer, answers
from .step_turn import StepRequest, TurnMeter

WORKER = "zspmd.runtime.programs.bench.sides.workers:Acknowledger"
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.SelectorEventLoop}
LOOPBACK = "127.0.0.1"
_WARM_UP = 300
_MAX_LINE_BYTES = 1 << 20


async def serve(arguments: argparse.Namespace, stream: Any) -> None:
    """Start the group, say so, and take turns to the end of standard input."""
    reader = asyncio.StreamReader(limit=_MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with make_group(arguments) as group:
        is_local = arguments.place is None
        meter = TurnMeter([rank.pid for rank in group.health() if rank.pid is not None] if is_local else ())
        await round_trips(group, b"", _WARM_UP, 2.0)
        gc.collect()
        gc.freeze()
        own = None if is_local else source_address(group.plan.nodes[0].address)
        answer(stream, {"address": own or (LOOPBACK if arguments.transport == "tcp" else None)})
        async for line in reader:
            answer(stream, await take_turn(group, StepRequest(**json.loads(line)), meter))


def make_group(arguments: argparse.Namespace) -> WorkerGroup:
    """Return a group of the ranks that are asked for, here or on another host."""
    output_ranks = "all" if arguments.replies == "all" else (0,)
    common: dict[str, Any] = {"world_size": arguments.ranks, "output_ranks": output_ranks, "preload": (), "window": arguments.window}
    if arguments.place is None:
        return launch(WORKER, devices="cpu", bind=LOOPBACK if arguments.transport == "tcp" else None, **common)
    host, nodes = read_place(arguments.place)
    return launch(WORKER, devices="cpu", hosts=[replace(host, slots=arguments.ranks)], nodes=nodes, **common)


def read_place(text: str) -> tuple[Host, NodesConfig]:
    """Return the host, and how it is reached, of a line of JSON."""
    place = json.loads(text)
    place["nodes"]["ssh_options"] = tuple(place["nodes"]["ssh_options"])
    place["nodes"]["environment"] = tuple(place["nodes"]["environment"])
    place["host"]["devices"] = None
    return Host(**place["host"]), NodesConfig(**place["nodes"])


async def take_turn(group: WorkerGroup, request: StepRequest, meter: TurnMeter) -> dict[str, Any]:
    """Publish steps, one after the other or several at once."""
    payload = bytes(request.payload)
    meter.begin()
    if request.window == 1:
        times_us = await round_trips(group, payload, request.steps, request.limit_s)
        return meter.finished(times_us, len(times_us), is_pipelined=False)
    return meter.finished([], await pipeline(group, payload, request), is_pipelined=True)


async def round_trips(group: WorkerGroup, payload: bytes, steps: int, limit_s: float) -> list[float]:
    """Return the microseconds of each step."""
    times_us = list[float]()
    end_ns = time.perf_counter_ns() + int(limit_s * 1e9)
    while len(times_us) < steps:
        began_ns = time.perf_counter_ns()
        await group.step(payload)
        ended_ns = time.perf_counter_ns()
        times_us.append((ended_ns - began_ns) / 1000)
        if ended_ns > end_ns:
            break
    return times_us


async def pipeline(group: WorkerGroup, payload: bytes, request: StepRequest) -> int:
    """Keep ``window`` steps in flight, and return how many there were."""
    in_flight: deque[PendingReply] = deque()
    end_s, count = time.perf_counter() + request.limit_s, 0
    while count < request.steps and time.perf_counter() < end_s:
        if len(in_flight) == request.window:
            await in_flight.popleft()
        in_flight.append(await group.submit(payload))
        count += 1
    for pending in in_flight:
        await pending
    return count


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--replies", choices=("all", "one"), default="all")
    parser.add_argument("--transport", choices=("ipc", "tcp"), default="ipc")
    parser.add_argument("--loop", choices=LOOPS, default="uvloop")
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--place")
    arguments = parser.parse_args()
    with answers() as stream:
        loop = LOOPS[arguments.loop]()
        try:
            loop.run_until_complete(serve(arguments, stream))
        finally:
            loop.close()


if __name__ == "__main__":
    main()
