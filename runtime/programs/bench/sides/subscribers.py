"""Simulated ranks of ``bench scale``, many in one process: each has its sockets and keys, takes every step, and computes nothing.

One line of JSON on standard input says which ranks, on which nodes, with which keys; its end is theirs. With relays each node has a real
one. A step whose body is ``ACK`` is acknowledged by every rank; any other by one of the process, when all of its ranks have it.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import threading
from collections import Counter
from typing import Any

import zmq

from .....process import die_with_parent
from .....transport.frames import ResultKind, StepFrame, StepKind
from .....transport.security import RankKeys
from .....transport.sockets import ResultPusher, StepSubscriber
from ....launch.agent_protocol import RelayOrder
from ....launch.nodes.relay import Relay

ACK = b"\x01"
SOCKETS_PER_RANK = 2


class Subscribers:
    """The ranks of one process, in a thread of their own from ``start`` on."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, SOCKETS_PER_RANK * len(order["ranks"]) + 16)
        self._poller = zmq.Poller()
        self._ends: dict[Any, tuple[StepSubscriber, ResultPusher]] = {}
        self._received: Counter[int] = Counter()
        for rank in order["ranks"]:
            self._open(rank, order)

    def _open(self, rank: dict[str, Any], order: dict[str, Any]) -> None:
        keys, number = read_keys(rank["keys"]), rank["rank"]
        pusher = ResultPusher(self._context, order["result"], epoch=1, rank=number, keys=keys)
        subscriber = StepSubscriber(
            self._context, rank["step"], epoch=1, rank=number, on_gap=_missed, keys=keys, is_relayed=order["is_relayed"]
        )
        self._poller.register(subscriber.socket, zmq.POLLIN)
        self._ends[subscriber.socket] = subscriber, pusher

    def start(self) -> None:
        """Let them listen, to the end of the process."""
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            for socket, _ in self._poller.poll():
                subscriber, pusher = self._ends[socket]
                while (frame := subscriber.receive(0)) is not None:
                    self._take(frame, pusher)

    def _take(self, frame: StepFrame, pusher: ResultPusher) -> None:
        self._received[frame.seq] += 1
        is_whole = self._received[frame.seq] == len(self._ends)
        if frame.kind is StepKind.SYNC or bytes(frame.body) == ACK or is_whole:
            pusher.push(ResultKind.ACK, frame.seq)
        if is_whole:
            del self._received[frame.seq]


def read_keys(keys: list[str]) -> RankKeys:
    """Return keys as they came in a line of JSON."""
    public, secret, server = (key.encode() for key in keys)
    return RankKeys(public, secret, server)


def write_keys(keys: RankKeys) -> list[str]:
    """Return keys as they go into a line of JSON, on standard input, where nobody else reads them."""
    return [key.decode() for key in (keys.public, keys.secret, keys.server)]


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as the system lets it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _missed(seq: int) -> None:
    raise RuntimeError(f"frame {seq} was lost")


async def serve(order: dict[str, Any]) -> None:
    """Run relays and ranks to the end of standard input."""
    relays = []
    for relay in order["relays"]:
        keys = read_keys(relay["keys"])
        relays.append(Relay(RelayOrder(order["step"], relay["endpoint"], keys.public, keys.secret, keys.server), _lost))
        relays[-1].start()
    Subscribers(order).start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def _lost(reason: str) -> None:
    print(f"a relay has lost its steps: {reason}", file=sys.stderr, flush=True)


def main() -> None:
    """Run as a program; the argument is the parent's pid."""
    die_with_parent(int(sys.argv[1]))
    raise_descriptor_limit()
    order = json.loads(sys.stdin.readline())
    loop = asyncio.new_event_loop()
    loop.run_until_complete(serve(order))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
