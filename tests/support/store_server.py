"""The driver's part of the control socket in a thread: a store for rank-side clients of the test's own process."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from time import monotonic

import zmq
from support.contexts import KeepingContext

import zspmd
from zspmd.errors import BadFrameError
from zspmd.runtime.driver.store import StoreState
from zspmd.transport.control_sockets import ControlClient, ControlServer
from zspmd.transport.records import Accepted, Hello, Reject, StoreReply, StoreRequest
from zspmd.workers.store_client import StoreClient

HELLO = Hello(token=b"t", rank=0, pid=1, host="h", version=zspmd.__version__, purpose="store")
PERIOD_MS = 2


class StoreServer:
    """Admits every hello and serves the store; a context manager.

    Attributes:
        answer: what a hello is answered with.
        is_silent: whether requests are left without a word.
        requests: how many each connection has sent.
    """

    def __enter__(self) -> StoreServer:
        self._directory = tempfile.TemporaryDirectory(prefix="z")
        self._endpoint = f"ipc://{self._directory.name}/control"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._client_context = KeepingContext()  # since threads of tests end before it
        self.answer: Accepted | Reject | StoreReply = Accepted()
        self.is_silent = False
        self.requests: Counter[bytes] = Counter()
        self.state = StoreState()
        self._stopped = threading.Event()
        self._server = ControlServer(self._context, [self._endpoint])
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._context.destroy(linger=0)
        self._client_context.destroy(linger=0)
        self._directory.cleanup()

    def client(self, timeout_s: float = 10.0) -> StoreClient:
        return StoreClient(lambda: ControlClient(self._client_context, self._endpoint), HELLO, timeout_s=timeout_s)

    def _run(self) -> None:
        while not self._stopped.is_set():
            replies = self.state.expire(monotonic())
            if self._server.sockets[0].poll(PERIOD_MS):
                connection, record, _ = self._server.receive()
                if isinstance(record, Hello):
                    self.requests[connection] = 0
                    self._server.send(connection, self.answer)
                elif isinstance(record, StoreRequest) and not self.is_silent:
                    self.requests[connection] += 1
                    try:
                        replies += self.state.handle(connection, record, monotonic())
                    except BadFrameError as error:
                        replies.append((connection, StoreReply(request_id=record.request_id, error=str(error))))
            for target, reply in replies:
                self._server.send(target, reply)
