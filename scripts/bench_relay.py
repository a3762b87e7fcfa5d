"""Prints what a node's relay saves the driver, and what it adds to a step, by the number of ranks on the node. Asserts nothing.

A driver's step and result sockets, behind a door, and the ranks of one other node: each connected by TCP with CURVE, or by a relay for
all of them. Driver and node have cores of their own where there are two. The two ways take turns in one run, so that a busy machine slows
both; read the ratios. ``driver`` is the processor time of the whole driver process, whose encryption is in a thread of ZeroMQ's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import zmq
from rich.console import Console
from rich.table import Table

from zspmd.runtime.launch.agent_protocol import RelayOrder
from zspmd.runtime.launch.nodes.relay import Relay
from zspmd.transport.door import Door
from zspmd.transport.frames import ResultKind, StepKind
from zspmd.transport.security import RankKeys, tcp_endpoint
from zspmd.transport.sockets import ResultCollector, ResultPusher, StepPublisher, StepSubscriber

NODE = 0
TURNS = 9
WARM_UP = 100
PAYLOADS = {"64 B": 64, "64 KiB": 64 << 10, "1 MiB": 1 << 20}
STEPS = {64: 300, 64 << 10: 200, 1 << 20: 30}  # a turn
RANKS = (1, 2, 3, 4, 8)
PEER_TIMEOUT_MS = 30_000


@dataclass
class Side:
    """One way, and the time and processor time of its steps, in microseconds."""

    driver: Driver
    round_trips: list[float] = field(default_factory=list)
    driver_us: list[float] = field(default_factory=list)  # by turn


class Driver:
    """The step and result sockets of a driver, whose ranks acknowledge every step."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.door = Door(self.context, num_ranks, lambda *event: print("refused:", *event, file=sys.stderr), {NODE: range(num_ranks)})
        self.publisher = StepPublisher(self.context, [tcp_endpoint("127.0.0.1")], epoch=1, door=self.door)
        self.collector = ResultCollector(self.context, [tcp_endpoint("127.0.0.1")], epoch=1, door=self.door)
        self.poller = zmq.Poller()
        for socket in (self.door.socket, self.publisher.sockets[0], self.collector.sockets[0]):
            self.poller.register(socket, zmq.POLLIN)

    def wait_joined(self) -> None:
        joined: set[int] = set()
        while len(joined) < self.num_ranks:
            for socket, _ in self._poll():
                if socket is self.door.socket:
                    self.door.answer_one()
                elif change := self.publisher.read_subscription():
                    joined.add(change[0])
        self.publisher.publish(StepKind.SYNC)
        self._collect()

    def step(self, payload: bytes) -> None:
        """Publish a step and wait for the word of every rank."""
        seq = self.publisher.publish(StepKind.STEP, b"", [payload])
        self._collect()
        self.publisher.forget(seq + 1)

    def _collect(self) -> None:
        missing = self.num_ranks
        while missing:
            for socket, _ in self._poll():
                if socket is self.door.socket:
                    self.door.answer_one()
                elif socket is self.collector.sockets[0]:
                    self.collector.receive()
                    missing -= 1
                else:
                    self.publisher.read_subscription()

    def _poll(self) -> list[tuple[Any, int]]:
        ready = self.poller.poll(PEER_TIMEOUT_MS)
        if not ready:
            sys.exit(f"no rank has said anything for {PEER_TIMEOUT_MS // 1000} s")
        return ready

    def close(self) -> None:
        self.publisher.publish(StepKind.STOP)
        self._collect()
        self.context.destroy(linger=0)


def as_order(keys: RankKeys, **fields: Any) -> str:
    """Return keys and other facts as a line for a process's standard input, where nobody else reads them."""
    return json.dumps({"public": keys.public.decode(), "secret": keys.secret.decode(), "server": keys.server.decode(), **fields})


@contextmanager
def serving(num_ranks: int, cores: Sequence[int], *, is_relayed: bool) -> Iterator[Driver]:
    """Start the processes of a node, and yield the driver that they all listen to."""
    driver = Driver(num_ranks)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="zbench"))
        upstream = driver.publisher.endpoints[0]
        local = f"ipc://{directory}/step" if is_relayed else upstream
        if is_relayed:
            _start(stack, cores, as_order(driver.door.node_keys(NODE), upstream=upstream, endpoint=local))
        for rank in range(num_ranks):
            order = as_order(
                driver.door.rank_keys(rank), rank=rank, step=local, result=driver.collector.endpoints[0], is_relayed=is_relayed
            )
            _start(stack, cores, order)
        driver.wait_joined()
        yield driver
        driver.close()


def _start(stack: ExitStack, cores: Sequence[int], order: str) -> None:
    process = subprocess.Popen([sys.executable, __file__, "--peer"], stdin=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    assert process.stdin is not None, "a pipe"
    stack.callback(process.stdin.close)
    os.sched_setaffinity(process.pid, cores)
    process.stdin.write(order + "\n")
    process.stdin.flush()


def serve() -> None:
    """Be what the line on standard input says: a relay until its end, or a rank until STOP."""
    order = json.loads(sys.stdin.readline())
    keys = RankKeys(*(order[name].encode() for name in ("public", "secret", "server")))
    if "rank" in order:
        serve_rank(order, keys)
    else:
        asyncio.run(serve_relay(RelayOrder(order["upstream"], order["endpoint"], keys.public, keys.secret, keys.server)))


def serve_rank(order: dict[str, Any], keys: RankKeys) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    rank = order["rank"]
    pusher = ResultPusher(context, order["result"], epoch=1, rank=rank, keys=keys)
    subscriber = StepSubscriber(
        context, order["step"], epoch=1, rank=rank, on_gap=lambda seq: None, keys=keys, is_relayed=order["is_relayed"]
    )
    while True:
        frame = subscriber.receive(PEER_TIMEOUT_MS)
        if frame is None:
            break
        pusher.push(ResultKind.ACK, frame.seq)
        if frame.kind is StepKind.STOP:
            break
    context.destroy(linger=1000)


async def serve_relay(order: RelayOrder) -> None:
    relay = Relay(order, lambda reason: None)
    relay.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    relay.close()


def take_turn(side: Side, payload: bytes, num_steps: int) -> None:
    spent = time.process_time_ns()
    for _ in range(num_steps):
        began = time.perf_counter_ns()
        side.driver.step(payload)
        side.round_trips.append((time.perf_counter_ns() - began) / 1000)
    side.driver_us.append((time.process_time_ns() - spent) / 1000 / num_steps)


def compare(num_ranks: int, size: int, turns: int, node_cores: Sequence[int]) -> list[str]:
    """Return the row of a table."""
    payload = bytes(size)
    with serving(num_ranks, node_cores, is_relayed=False) as direct, serving(num_ranks, node_cores, is_relayed=True) as relayed:
        sides = (Side(direct), Side(relayed))
        for side in sides:
            take_turn(side, payload, min(WARM_UP, STEPS[size]))
        for side in sides:
            side.round_trips.clear()
            side.driver_us.clear()
        for _ in range(turns):
            for side in sides:
                take_turn(side, payload, STEPS[size])
    row = []
    for measured in ([statistics.median(side.round_trips) for side in sides], [statistics.median(side.driver_us) for side in sides]):
        row += [f"{measured[0]:.0f}", f"{measured[1]:.0f}", f"{measured[1] / measured[0]:.2f}"]
    return row


def split_cores() -> tuple[list[int], list[int]]:
    """Return the driver's cores and those of the node."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return (cores[:half], cores[half:]) if half else (cores, cores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        serve()
        return
    console = Console(width=140)
    driver_cores, node_cores = split_cores()
    os.sched_setaffinity(0, driver_cores)
    console.print(f"{shlex.join(sys.argv)}; Python {platform.python_version()}, libzmq {zmq.zmq_version()}", highlight=False)
    console.print(f"{os.cpu_count()} cores: driver {driver_cores}, node {node_cores}; load {os.getloadavg()[0]:.1f}", highlight=False)
    table = Table("payload", "ranks", "step us, direct", "relayed", "ratio", "driver us, direct", "relayed", "ratio")
    for name, size in PAYLOADS.items():
        for num_ranks in arguments.ranks:
            table.add_row(name, str(num_ranks), *compare(num_ranks, size, arguments.turns, node_cores))
    console.print(table)


if __name__ == "__main__":
    main()
