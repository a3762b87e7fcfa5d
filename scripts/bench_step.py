"""Prints the round trip of a step through a worker group beside raw pyzmq doing the same with blocking sockets. Asserts nothing.

Both sides publish a payload to the same number of processes by XPUB and wait for an answer of each by PULL, over ipc or over TCP with
CURVE. They take turns in one run, so that a busy machine slows both: the ratio is the median of those of neighbouring turns. With
``--host`` the processes of both are on another machine; processor time and wake-ups are then the driver's alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import uvloop
import zmq
from rich.console import Console
from rich.table import Table

import zspmd
from zspmd.runtime.launch.hosts.host import Host
from zspmd.runtime.launch.hosts.own_host import source_address
from zspmd.runtime.launch.nodes.agent_link import rsh_argv
from zspmd.transport.security import tcp_endpoint

LOOPBACK = "127.0.0.1"
WARM_UP = 300
PEER_TIMEOUT_MS = 30_000
ANSWER_BYTES = 33  # as many as the group's: a header of 32 B and a body of one
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.SelectorEventLoop}
PAIRED = ("us", "p99_us", "driver_cpu_us", "all_cpu_us", "wakeups")
RawTrip = Callable[[bytes], None]


class Acknowledger(zspmd.Worker):
    """Answers each step with nothing, as soon as it is there."""

    def step(self, inputs: Any) -> None:
        return None


@dataclass(frozen=True)
class Case:
    """What is measured: how many ranks answer a payload of how many bytes, over which transport, and the driver's loop."""

    loop: str
    transport: str
    ranks: int
    payload: int


@dataclass(frozen=True)
class Turn:
    """One turn of one side: each round trip, and what a step took of the driver's thread and of all threads of both ends."""

    times_us: list[float]
    driver_cpu_us: float
    all_cpu_us: float
    wakeups: float


@dataclass(frozen=True)
class Outcome:
    """The turns of both sides in one case."""

    case: Case
    ours: list[Turn]
    raw: list[Turn]

    def ratios(self) -> list[float]:
        """Return the quartiles of the ratios of one turn's median to that of the turn after it, and the ratio of all 99th percentiles."""
        turns = [statistics.median(ours.times_us) / statistics.median(raw.times_us) for ours, raw in zip(self.ours, self.raw)]
        return [*statistics.quantiles(turns, n=4), p99(pooled(self.ours)) / p99(pooled(self.raw))]


class Meter:
    """Adds up processor time and wake-ups of this process and others, thread by thread, as the kernel counts them."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._threads = [f"/proc/{pid}/task/{thread}" for pid in (os.getpid(), *pids) for thread in os.listdir(f"/proc/{pid}/task")]

    def read(self) -> tuple[float, int]:
        """Return microseconds and voluntary switches since the threads began."""
        spent_ns = switches = 0
        for thread in self._threads:
            with open(f"{thread}/schedstat") as stat:
                spent_ns += int(stat.read().split()[0])
            with open(f"{thread}/status") as status:
                switches += next(int(line.split()[1]) for line in status if line.startswith("voluntary_ctxt"))
        return spent_ns / 1000, switches


@dataclass(frozen=True)
class Place:
    """Where the processes of both sides run: on this machine, or on a host that ``config`` reaches."""

    host: Host | None
    config: zspmd.NodesConfig

    def launch(self, case: Case) -> zspmd.WorkerGroup:
        if self.host is not None:
            hosts = [replace(self.host, slots=case.ranks)]
            return zspmd.launch(Acknowledger, world_size=case.ranks, output_ranks="all", preload=(), hosts=hosts, nodes=self.config)
        bind = LOOPBACK if case.transport == "tcp" else None
        return zspmd.launch(Acknowledger, world_size=case.ranks, output_ranks="all", preload=(), bind=bind)

    def address(self, case: Case, group: zspmd.WorkerGroup) -> str | None:
        """Return where the driver's side binds TCP; None for ipc."""
        if self.host is not None:
            return source_address(group.plan.nodes[0].address)
        return LOOPBACK if case.transport == "tcp" else None

    def start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        """Start a raw peer there."""
        return subprocess.Popen(argv if self.host is None else rsh_argv(self.host, self.config, f"exec {shlex.join(argv)}"))


async def run_case(case: Case, turns: int, steps: int, place: Place) -> Outcome:
    outcome = Outcome(case, [], [])
    payload = bytes(case.payload)
    async with place.launch(case) as group:
        with raw_peers(case.ranks, place, place.address(case, group)) as (round_trip, raw_pids):
            group_pids = [rank.pid for rank in group.health() if rank.pid is not None]
            group_meter, raw_meter = (Meter(pids if place.host is None else ()) for pids in (group_pids, raw_pids))
            await group_turn(group, payload, WARM_UP, group_meter)
            raw_turn(round_trip, payload, WARM_UP, raw_meter)
            for _ in range(turns):
                outcome.ours.append(await group_turn(group, payload, steps, group_meter))
                outcome.raw.append(raw_turn(round_trip, payload, steps, raw_meter))
    return outcome


async def group_turn(group: zspmd.WorkerGroup, payload: bytes, steps: int, meter: Meter) -> Turn:
    times = list[float]()
    before, own = meter.read(), time.thread_time_ns()
    for _ in range(steps):
        began = time.perf_counter_ns()
        await group.step(payload)
        times.append((time.perf_counter_ns() - began) / 1000)
    own_us = (time.thread_time_ns() - own) / 1000
    return finished(times, own_us, before, meter.read())


def raw_turn(round_trip: RawTrip, payload: bytes, steps: int, meter: Meter) -> Turn:
    times = list[float]()
    before, own = meter.read(), time.thread_time_ns()
    for _ in range(steps):
        began = time.perf_counter_ns()
        round_trip(payload)
        times.append((time.perf_counter_ns() - began) / 1000)
    own_us = (time.thread_time_ns() - own) / 1000
    return finished(times, own_us, before, meter.read())


def finished(times: list[float], own_us: float, before: tuple[float, int], after: tuple[float, int]) -> Turn:
    count = len(times)
    return Turn(times, own_us / count, (after[0] - before[0]) / count, (after[1] - before[1]) / count)


@contextmanager
def raw_peers(num_peers: int, place: Place, address: str | None) -> Iterator[tuple[RawTrip, list[int]]]:
    """Start processes that wait in ``serve_raw``; yields what sends a payload to all and returns when each has answered, and their pids."""
    with tempfile.TemporaryDirectory(prefix="zbench") as directory, zmq.Context() as context:
        publisher, collector = context.socket(zmq.XPUB), context.socket(zmq.PULL)
        publisher.setsockopt(zmq.XPUB_VERBOSE, 1)  # or it tells of the first subscription only
        public, secret = zmq.curve_keypair()
        for socket, name in ((publisher, "step"), (collector, "result")):
            if address is not None:
                socket.setsockopt(zmq.CURVE_SERVER, 1)
                socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
            socket.bind(f"ipc://{directory}/{name}" if address is None else tcp_endpoint(address))
            socket.setsockopt(zmq.RCVTIMEO, PEER_TIMEOUT_MS)
        endpoints = [str(socket.getsockopt_string(zmq.LAST_ENDPOINT)) for socket in (publisher, collector)]
        argv = [sys.executable, os.path.abspath(__file__), "--peer", *endpoints, "" if address is None else public.decode()]
        peers = [place.start(argv) for _ in range(num_peers)]
        try:
            for _ in peers:
                publisher.recv()  # a subscription
                collector.recv()

            def round_trip(payload: bytes) -> None:
                publisher.send(payload)
                for _ in peers:
                    collector.recv()

            yield round_trip, [peer.pid for peer in peers]
        finally:
            publisher.send(b"")  # their end, which on another machine no signal tells them
            for peer in peers:
                peer.wait()
            publisher.close(0)
            collector.close(0)


def serve_raw(step_endpoint: str, result_endpoint: str, server_key: str) -> None:
    """Answer every message up to an empty one, or until left alone."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    subscriber, pusher = context.socket(zmq.SUB), context.socket(zmq.PUSH)
    for socket in (subscriber, pusher):
        if server_key:
            socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
            socket.curve_serverkey = server_key.encode()
    subscriber.subscribe(b"")
    subscriber.connect(step_endpoint)
    pusher.connect(result_endpoint)
    subscriber.setsockopt(zmq.RCVTIMEO, PEER_TIMEOUT_MS)
    pusher.send(bytes(ANSWER_BYTES))
    with contextlib.suppress(zmq.Again):
        while subscriber.recv():
            pusher.send(bytes(ANSWER_BYTES))
    context.destroy(linger=0)


def pooled(turns: list[Turn]) -> list[float]:
    return [sample for turn in turns for sample in turn.times_us]


def p99(samples: list[float]) -> float:
    return statistics.quantiles(samples, n=100)[98]


def summary(outcome: Outcome) -> dict[str, Any]:
    """Return the figures of a case under their names."""
    lower, ratio, upper, tail = outcome.ratios()
    figures: dict[str, Any] = {**asdict(outcome.case), "ratio": ratio, "lower": lower, "upper": upper, "p99_ratio": tail}
    for side, turns in (("ours", outcome.ours), ("raw", outcome.raw)):
        figures[f"{side}_us"] = statistics.median(pooled(turns))
        figures[f"{side}_p99_us"] = p99(pooled(turns))
        for name in ("driver_cpu_us", "all_cpu_us", "wakeups"):
            figures[f"{side}_{name}"] = statistics.median(getattr(turn, name) for turn in turns)
    return figures


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    sides = ("median us, group / raw", "p99 us", "ratio", "its quartiles", "driver's thread us", "all threads us", "wake-ups")
    table = Table("loop", "transport", "ranks", "payload B", *sides, title="Round trip of a step")
    for row in rows:
        pairs = {name: f"{row[f'ours_{name}']:.1f} / {row[f'raw_{name}']:.1f}" for name in PAIRED}
        table.add_row(
            *(str(row[name]) for name in ("loop", "transport", "ranks", "payload")),
            pairs["us"],
            pairs["p99_us"],
            f"{row['ratio']:.2f}",
            f"{row['lower']:.2f} to {row['upper']:.2f}",
            *(pairs[name] for name in ("driver_cpu_us", "all_cpu_us", "wakeups")),
        )
    console.print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", nargs=3, metavar=("STEP", "RESULT", "KEY"), help=argparse.SUPPRESS)
    parser.add_argument("--loop", nargs="+", choices=LOOPS, default=list(LOOPS), help="event loops of the driver")
    parser.add_argument("--transport", nargs="+", choices=("ipc", "tcp"), default=["ipc", "tcp"], help="tcp is with CURVE, on the loopback")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--payload", nargs="+", type=int, default=[512, 64 << 10], metavar="BYTES")
    parser.add_argument("--turns", type=int, default=20, help="of each side")
    parser.add_argument("--steps", type=int, default=100, help="of a turn")
    parser.add_argument("--host", help="a machine, reached by --rsh, on which the processes of both run, over TCP with CURVE")
    parser.add_argument("--rsh", default="ssh", help="as of zspmd-run")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.peer is not None:
        return serve_raw(*options.peer)
    if options.host is not None:
        options.transport = ["tcp"]
    place = Place(None if options.host is None else Host(options.host), zspmd.NodesConfig(rsh=options.rsh, relay="off"))
    console = Console()
    libraries = f"Python {platform.python_version()}, pyzmq {zmq.__version__} over libzmq {zmq.zmq_version()}, uvloop {version('uvloop')}"
    console.print(f"{processor()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f} before the start; {libraries}")
    console.print(f"command: {shlex.join(sys.argv)}")
    rows = []
    for transport, ranks, payload, loop in itertools.product(options.transport, options.ranks, options.payload, options.loop):
        case = Case(loop, transport, ranks, payload)
        rows.append(summary(run_on(LOOPS[loop](), run_case(case, options.turns, options.steps, place))))
    print_table(console, rows)
    if options.json:
        with open(options.json, "w") as output:
            json.dump(rows, output, indent=1)


def run_on(loop: asyncio.AbstractEventLoop, work: Any) -> Outcome:
    gc.collect()
    try:
        outcome: Outcome = loop.run_until_complete(work)
        return outcome
    finally:
        loop.close()


def processor() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
