"""A driver's step and result sockets before many simulated ranks, over TCP with CURVE: directly, or with a relay on each of their nodes."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import zmq

from .....transport.door import Door
from .....transport.frames import StepKind
from .....transport.security import tcp_endpoint
from .....transport.sockets import ResultCollector, StepPublisher
from ..side_server import answers, serve
from .subscribers import ACK, raise_descriptor_limit, write_keys

_LOOPBACK = "127.0.0.1"
_RANKS_PER_PROCESS = 256
_JOIN_S = 90.0
_STEP_S = 30.0
_WARM_UP = 5


class ScaleDriver:
    """What a driver has for ``num_ranks`` ranks, ``per_node`` on each node.

    Raises:
        TimeoutError: ranks that do not come, or do not answer.
    """

    def __init__(self, num_ranks: int, per_node: int, *, is_relayed: bool) -> None:
        self.num_ranks = num_ranks
        self.nodes = {node: range(first, min(first + per_node, num_ranks)) for node, first in enumerate(range(0, num_ranks, per_node))}
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.door = Door(self.context, num_ranks, _tell, self.nodes if is_relayed else {})
        self.publisher = StepPublisher(self.context, [tcp_endpoint(_LOOPBACK)], epoch=1, door=self.door)
        self.collector = ResultCollector(self.context, [tcp_endpoint(_LOOPBACK)], epoch=1, door=self.door)
        self._poller = zmq.Poller()
        for socket in (self.door.socket, self.publisher.sockets[0], self.collector.sockets[0]):
            self._poller.register(socket, zmq.POLLIN)

    def wait_joined(self) -> None:
        """Wait until every rank has subscribed, and has answered a first frame."""
        joined: set[int] = set()
        end_s = time.monotonic() + _JOIN_S
        while len(joined) < self.num_ranks:
            for socket, _ in self._poll(end_s, f"{self.num_ranks - len(joined)} ranks have not subscribed"):
                if socket is self.door.socket:
                    self.door.answer_one()
                elif change := self.publisher.read_subscription():
                    joined.add(change[0])
        self.publisher.publish(StepKind.SYNC)
        self._collect(self.num_ranks, _JOIN_S)

    def step(self, payload: bytes, *, is_acknowledged: bool, num_processes: int) -> int:
        """Publish a step and wait for its acknowledgements; returns the nanoseconds of the publication alone."""
        began_ns = time.perf_counter_ns()
        seq = self.publisher.publish(StepKind.STEP, ACK if is_acknowledged else b"\x00", [payload])
        published_ns = time.perf_counter_ns() - began_ns
        self._collect(self.num_ranks if is_acknowledged else num_processes, _STEP_S)
        self.publisher.forget(seq + 1)
        return published_ns

    def _collect(self, missing: int, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while missing:
            for socket, _ in self._poll(end_s, f"{missing} answers are missing"):
                if socket is self.door.socket:
                    self.door.answer_one()
                elif socket is self.publisher.sockets[0]:
                    self.publisher.read_subscription()
                else:
                    missing -= self._take_answers()

    def _take_answers(self) -> int:
        """Read what has arrived, as the driver's own reader does: many at once."""
        count = 0
        try:
            while True:
                self.collector.receive()
                count += 1
        except zmq.Again:
            return count

    def _poll(self, end_s: float, what: str) -> list[tuple[Any, int]]:
        ready = self._poller.poll(max(0, int((end_s - time.monotonic()) * 1000)))
        if not ready:
            raise TimeoutError(what)
        return ready


@contextmanager
def driver_and_ranks(num_ranks: int, per_node: int, *, is_relayed: bool) -> Iterator[tuple[ScaleDriver, int]]:
    """Start the ranks' processes; yields the driver, and how many processes there are."""
    driver = ScaleDriver(num_ranks, per_node, is_relayed=is_relayed)
    with ExitStack() as stack:
        stack.callback(driver.context.destroy, linger=0)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="zbench"))
        nodes_per_process = max(1, _RANKS_PER_PROCESS // per_node)
        numbers = list(driver.nodes)
        chunks = [numbers[first : first + nodes_per_process] for first in range(0, len(numbers), nodes_per_process)]
        for nodes in chunks:
            _start(stack, _order(driver, nodes, directory, is_relayed=is_relayed))
        driver.wait_joined()
        yield driver, len(chunks)


def _order(driver: ScaleDriver, nodes: list[int], directory: str, *, is_relayed: bool) -> dict[str, Any]:
    """Return what a process of simulated ranks is told."""
    upstream = driver.publisher.endpoints[0]
    endpoints = {node: f"ipc://{directory}/{node}" if is_relayed else upstream for node in nodes}
    ranks = [
        {"rank": rank, "step": endpoints[node], "keys": write_keys(driver.door.rank_keys(rank))}
        for node in nodes
        for rank in driver.nodes[node]
    ]
    relays = [{"endpoint": endpoints[node], "keys": write_keys(driver.door.node_keys(node))} for node in nodes] if is_relayed else []
    return {"ranks": ranks, "relays": relays, "step": upstream, "result": driver.collector.endpoints[0], "is_relayed": is_relayed}


def _start(stack: ExitStack, order: dict[str, Any]) -> None:
    argv = [sys.executable, "-m", "zspmd.runtime.programs.bench.sides.subscribers", str(os.getpid())]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    if process.stdin is None:
        raise RuntimeError("a pipe was asked for")
    stack.callback(process.stdin.close)
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()


def take_turn(driver: ScaleDriver, num_processes: int, request: dict[str, Any]) -> dict[str, Any]:
    """Do steps, and say what each took of this process's processor time, all threads together."""
    payload, is_acknowledged = bytes(request["payload"]), request["is_acknowledged"]
    for _ in range(_WARM_UP):
        driver.step(payload, is_acknowledged=is_acknowledged, num_processes=num_processes)
    began_ns, spent_ns = time.perf_counter_ns(), time.process_time_ns()
    own_ns, published_ns, count = time.thread_time_ns(), 0, 0
    while count < request["steps"] and time.perf_counter_ns() - began_ns < request["limit_s"] * 1e9:
        published_ns += driver.step(payload, is_acknowledged=is_acknowledged, num_processes=num_processes)
        count += 1
    elapsed_us = (time.perf_counter_ns() - began_ns) / 1000 / count
    spent_us, own_us = (
        (now - before) / 1000 / count for now, before in ((time.process_time_ns(), spent_ns), (time.thread_time_ns(), own_ns))
    )
    return {"driver us": spent_us, "its thread us": own_us, "publish us": published_ns / 1000 / count, "step us": elapsed_us}


def _tell(*event: object) -> None:
    print("refused:", *event, file=sys.stderr)


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--per-node", type=int, required=True)
    parser.add_argument("--relayed", action="store_true")
    arguments = parser.parse_args()
    raise_descriptor_limit()
    with (
        answers() as stream,
        driver_and_ranks(arguments.ranks, arguments.per_node, is_relayed=arguments.relayed) as (driver, num_processes),
    ):
        gc.collect()
        gc.freeze()
        serve(stream, lambda request: take_turn(driver, num_processes, request))


if __name__ == "__main__":
    main()
