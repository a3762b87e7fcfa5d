"""The floor: raw pyzmq in the same pattern, with the sockets, processes and sizes of a worker group, and everything blocking."""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import zmq

from .....transport.security import tcp_endpoint
from ....launch.nodes.agent_link import rsh_argv
from ..side_server import answers, serve
from . import raw_peer
from .group_side import read_place
from .step_turn import StepRequest, TurnMeter

_WARM_UP = 300
_END_S = 5.0
_OPEN_TIMEOUT_MS = 30_000


@dataclass
class RawDriver:
    """An XPUB and a PULL, and the processes that answer."""

    publisher: zmq.Socket[bytes]
    collector: zmq.Socket[bytes]
    num_replies: int

    def round_trip(self, payload: bytes) -> None:
        """Send a payload to all, and return when each that answers has done so."""
        self.publisher.send(payload)
        self.collect()

    def collect(self) -> None:
        """Wait for the answers to one payload."""
        for _ in range(self.num_replies):
            self.collector.recv()

    def round_trips(self, payload: bytes, steps: int, limit_s: float) -> list[float]:
        """Return the microseconds of each."""
        times_us = list[float]()
        end_ns = time.perf_counter_ns() + int(limit_s * 1e9)
        while len(times_us) < steps:
            began_ns = time.perf_counter_ns()
            self.round_trip(payload)
            ended_ns = time.perf_counter_ns()
            times_us.append((ended_ns - began_ns) / 1000)
            if ended_ns > end_ns:
                break
        return times_us

    def pipeline(self, payload: bytes, request: StepRequest) -> int:
        """Keep ``window`` payloads in flight, and return how many there were."""
        end_s, count = time.perf_counter() + request.limit_s, 0
        while count < request.steps and time.perf_counter() < end_s:
            if count >= request.window:
                self.collect()
            self.publisher.send(payload)
            count += 1
        for _ in range(min(count, request.window)):
            self.collect()
        return count

    def take_turn(self, request: StepRequest, meter: TurnMeter) -> dict[str, Any]:
        """Do what is asked."""
        payload = bytes(request.payload)
        meter.begin()
        if request.window == 1:
            times_us = self.round_trips(payload, request.steps, request.limit_s)
            return meter.finished(times_us, len(times_us), is_pipelined=False)
        return meter.finished([], self.pipeline(payload, request), is_pipelined=True)


@contextmanager
def raw_driver(arguments: argparse.Namespace) -> Iterator[tuple[RawDriver, list[int]]]:
    """Start the processes that answer; yields the driver's side, and their pids."""
    with tempfile.TemporaryDirectory(prefix="zbench") as directory, zmq.Context() as context:
        publisher, collector = context.socket(zmq.XPUB), context.socket(zmq.PULL)
        publisher.setsockopt(zmq.XPUB_VERBOSE, 1)  # or it tells of the first subscription only
        public, secret = zmq.curve_keypair()
        for socket, name in ((publisher, "step"), (collector, "result")):
            if arguments.address is not None:
                socket.setsockopt(zmq.CURVE_SERVER, 1)
                socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
            socket.bind(f"ipc://{directory}/{name}" if arguments.address is None else tcp_endpoint(arguments.address))
            socket.setsockopt(zmq.RCVTIMEO, _OPEN_TIMEOUT_MS)
        endpoints = [str(socket.getsockopt_string(zmq.LAST_ENDPOINT)) for socket in (publisher, collector)]
        key = "" if arguments.address is None else public.decode()
        num_replies = arguments.ranks if arguments.replies == "all" else 1
        peers = [_start_peer(arguments.place, endpoints, key, is_silent=rank >= num_replies) for rank in range(arguments.ranks)]
        try:
            for _ in peers:
                publisher.recv()  # a subscription
                collector.recv()
            yield RawDriver(publisher, collector, num_replies), [peer.pid for peer in peers]
        finally:
            publisher.send(b"")  # their end, which on another machine no signal tells them
            _end_peers(peers)
            publisher.close(0)
            collector.close(0)


def _start_peer(place: str | None, endpoints: list[str], key: str, *, is_silent: bool) -> subprocess.Popen[bytes]:
    argv = [
        sys.executable,
        os.path.abspath(raw_peer.__file__),
        *endpoints,
        key,
        str(int(is_silent)),
        str(os.getpid() if place is None else 0),
    ]
    # ssh would read what this side is told
    return subprocess.Popen(argv if place is None else rsh_argv(*read_place(place), f"exec {shlex.join(argv)}"), stdin=subprocess.DEVNULL)


def _end_peers(peers: list[subprocess.Popen[bytes]]) -> None:
    end_s = time.monotonic() + _END_S
    for peer in peers:
        try:
            peer.wait(max(0.0, end_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            peer.kill()
            peer.wait()


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--replies", choices=("all", "one"), default="all")
    parser.add_argument("--address", help="where to bind TCP, with CURVE; ipc without")
    parser.add_argument("--place")
    arguments = parser.parse_args()
    with answers() as stream, raw_driver(arguments) as (driver, pids):
        meter = TurnMeter(pids if arguments.place is None else ())
        driver.round_trips(bytes(1), _WARM_UP, 2.0)
        gc.collect()
        gc.freeze()
        serve(stream, lambda request: driver.take_turn(StepRequest(**request), meter))


if __name__ == "__main__":
    main()
