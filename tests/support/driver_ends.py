"""The driver's three sockets behind a door, without the rest of a driver, and ends of ranks that connect to them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import zmq
from support.polling import block_until

from zspmd.transport.control_sockets import ControlClient, ControlServer, Received
from zspmd.transport.door import Door
from zspmd.transport.frames import ResultFrame
from zspmd.transport.security import RankKeys, tcp_endpoint
from zspmd.transport.sockets import ResultCollector, ResultPusher, StepPublisher, StepSubscriber

Context = zmq.Context[zmq.Socket[bytes]]
EPOCH = 7
PERIOD_MS = 5
TakenT = TypeVar("TakenT")
TCP = tcp_endpoint("127.0.0.1")


class DriverEnds:
    """The driver's three sockets behind a door, which a thread answers.

    Args:
        nodes: the ranks of each node that has a relay.
        is_local_too: whether the sockets listen within the process as well, at their second endpoint.
    """

    def __init__(
        self, context: Context, world_size: int = 2, nodes: Mapping[int, Sequence[int]] | None = None, *, is_local_too: bool = False
    ) -> None:
        self.context = context
        self.events: list[tuple[str, int | None, str]] = []
        self.door = Door(context, world_size, lambda *event: self.events.append(event), nodes or {})

        def endpoints(name: str) -> list[str]:
            return [TCP, f"inproc://{name}"] if is_local_too else [TCP]

        self.publisher = StepPublisher(context, endpoints("step"), epoch=EPOCH, door=self.door)
        self.collector = ResultCollector(context, endpoints("result"), epoch=EPOCH, door=self.door)
        self.server = ControlServer(context, endpoints("control"), self.door)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def pusher(self, rank: int, keys: RankKeys | None = None, *, index: int = 0) -> ResultPusher:
        return ResultPusher(self.context, self.collector.endpoints[index], epoch=EPOCH, rank=rank, keys=keys or self.door.rank_keys(rank))

    def subscriber(
        self, rank: int, *, keys: RankKeys | None = None, index: int = 0, on_gap: Callable[[int], None] = lambda seq: None
    ) -> StepSubscriber:
        keys = keys or self.door.rank_keys(rank)
        return StepSubscriber(self.context, self.publisher.endpoints[index], epoch=EPOCH, rank=rank, on_gap=on_gap, keys=keys)

    def client(self, rank: int, *, index: int = 0) -> ControlClient:
        return ControlClient(self.context, self.server.endpoints[index], self.door.rank_keys(rank))

    def _answer(self) -> None:
        while not self._is_closed.is_set():
            if self.door.socket.poll(PERIOD_MS):
                self.door.answer_one()
        self.door.close()

    def close_door(self) -> None:
        self._is_closed.set()
        self._thread.join()

    def result(self, index: int = 0) -> ResultFrame | None:
        return take(self.collector.sockets[index], lambda: self.collector.receive(index))

    def record(self, index: int = 0) -> Received:
        return take(self.server.sockets[index], lambda: self.server.receive(index))

    def subscription(self, index: int = 0) -> tuple[int, bool] | None:
        return take(self.publisher.sockets[index], lambda: self.publisher.read_subscription(index))

    def wait_joined(self, *ranks: int, index: int = 0) -> None:
        """Return once these ranks have subscribed on one socket, each for itself."""
        missing = set(ranks)
        while missing:
            change = self.subscription(index)
            if change is not None and change[1]:
                missing.discard(change[0])


def take(socket: zmq.Socket[Any], receive: Callable[[], TakenT]) -> TakenT:
    """Return what ``receive`` does, once it has something: a socket is readable when a peer's name is there, and its message is not."""
    while True:
        block_until(lambda: socket.poll(0))
        with contextlib.suppress(zmq.Again):
            return receive()
