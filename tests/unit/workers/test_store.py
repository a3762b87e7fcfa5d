"""A rank's store client, and torch's view of it, against a server that is the driver's own state machine."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import monotonic

import pytest
import zmq
from support.contexts import KeepingContext
from torch.distributed.distributed_c10d import PrefixStore

import zspmd
from zspmd.errors import BadFrameError, PeerLostError, ProtocolError, StoreTimeoutError
from zspmd.runtime.driver.store import StoreState
from zspmd.transport.records import Accepted, Beat, Hello, Reject, StoreReply, StoreRequest
from zspmd.transport.sockets import ControlServer
from zspmd.workers import store_client
from zspmd.workers.store_client import StoreClient
from zspmd.workers.torch_store import CoordinatorStore

HELLO = Hello(token=b"t", rank=0, pid=1, host="h", version=zspmd.__version__, purpose="store")
PERIOD_MS = 2


class Server:
    """The driver's part in a thread: admits every hello and serves the store. ``answer`` replaces the reply to a hello."""

    def __init__(self, endpoint: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.endpoint = endpoint
        self.answer: Accepted | Reject | StoreReply = Accepted()
        self.is_silent = False
        self.hellos = 0
        self._stopped = threading.Event()
        self._server = ControlServer(self.context, endpoint)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.client_context = KeepingContext()  # since threads of these tests end before it

    def client(self, timeout_s: float = 10.0) -> StoreClient:
        return StoreClient(self.client_context, self.endpoint, HELLO, timeout_s=timeout_s)

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()
        self.context.destroy(linger=0)
        self.client_context.destroy(linger=0)

    def _run(self) -> None:
        state = StoreState()
        while not self._stopped.is_set():
            replies = state.expire(monotonic())
            if self._server.socket.poll(PERIOD_MS):
                connection, record = self._server.receive()
                if isinstance(record, Hello):
                    self.hellos += 1
                    self._server.send(connection, self.answer)
                elif isinstance(record, StoreRequest) and not self.is_silent:
                    try:
                        replies += state.handle(connection, record, monotonic())
                    except BadFrameError as error:
                        replies.append((connection, StoreReply(request_id=record.request_id, error=str(error))))
            for target, reply in replies:
                self._server.send(target, reply)


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="z") as directory:
        made = Server(f"ipc://{directory}/control")
        yield made
        made.close()


@pytest.fixture
def store(server: Server) -> StoreClient:
    return server.client()


def test_operations(store: StoreClient) -> None:
    store.set("k", b"v")
    assert store.get("k") == b"v"
    assert store.add("n", 5) == 5
    assert store.add("n", -7) == -2
    assert store.compare_set("k", b"v", b"w") == b"w"
    assert store.compare_set("k", b"v", b"x") == b"w"
    assert (store.check(["k", "n"]), store.check(["k", "z"]), store.count()) == (True, False, 2)
    assert (store.delete("k"), store.delete("k"), store.count()) == (True, False, 1)
    store.wait(["n"])


def test_a_timeout_names_the_absent_keys(store: StoreClient) -> None:
    store.set("a", b"")
    with pytest.raises(StoreTimeoutError, match=r"no value for b, c within 0\.01 s; another rank has not set it") as caught:
        store.wait(["a", "b", "c"], timeout_s=0.01)
    assert caught.value.absent == ("b", "c")
    with pytest.raises(StoreTimeoutError, match="k0, k1, k2, k3, k4, k5, k6, k7 and 2 more"):
        store.wait([f"k{i}" for i in range(10)], timeout_s=0.01)
    with pytest.raises(StoreTimeoutError, match="no value for d within"):
        store.get("d", timeout_s=0.01)


def test_the_timeout_of_the_client_is_the_one_unless_said_otherwise(server: Server) -> None:
    with pytest.raises(StoreTimeoutError, match=r"within 0\.02 s"):
        server.client(timeout_s=0.02).get("k")


def test_adding_to_text_is_told(store: StoreClient) -> None:
    store.set("k", b"text")
    with pytest.raises(ValueError, match="store key 'k' holds b'text', which add cannot count with"):
        store.add("k", 1)
    assert store.get("k") == b"text"


def test_a_value_that_is_too_large_is_refused_here(store: StoreClient) -> None:
    with pytest.raises(BadFrameError, match=r"StoreRequest\.value has length 524289; the limit is 524288"):
        store.set("k", bytes((512 << 10) + 1))


def test_threads_wait_and_set_over_connections_of_their_own(server: Server, store: StoreClient) -> None:
    num_threads = 8
    with ThreadPoolExecutor(num_threads + 1) as pool:
        waiting = [pool.submit(store.get, f"k{i}") for i in range(num_threads)]
        counts = [pool.submit(store.add, "n", 1)]
        for i in reversed(range(num_threads)):
            store.set(f"k{i}", b"%d" % i)
        assert [future.result() for future in waiting] == [b"%d" % i for i in range(num_threads)]
        counts += [pool.submit(store.add, "n", 1) for _ in range(99)]
        assert sorted(future.result() for future in counts) == list(range(1, 101))
    assert 2 <= server.hellos <= num_threads + 2


def test_a_late_reply_is_not_taken_for_the_next(server: Server, store: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    store.set("k", b"right")
    monkeypatch.setattr(store_client, "REPLY_MARGIN_S", -0.2)  # gives up before the driver's word comes
    with pytest.raises(PeerLostError):
        store.get("absent", timeout_s=0.25)
    monkeypatch.undo()
    assert store._connection().socket.poll(5000)  # there it is
    assert store.get("k") == b"right"


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (Reject(reason="the token is not this launch's"), PeerLostError, "refused a store connection: the token is not"),
        (StoreReply(request_id=0), ProtocolError, "answered a store connection with a StoreReply"),
    ],
    ids=["refused", "wrong answer"],
)
def test_a_connection_that_is_not_accepted(server: Server, answer: Reject | StoreReply, error: type[Exception], words: str) -> None:
    server.answer = answer
    with pytest.raises(error, match=words):
        server.client().count()


def test_a_silent_driver_is_a_lost_peer(server: Server, store: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    store.count()
    server.is_silent = True
    monkeypatch.setattr(store_client, "REPLY_MARGIN_S", 0.02)
    with pytest.raises(PeerLostError, match="no answer of the driver"):
        store.get("k", timeout_s=0.01)


def test_torch_finds_its_store(store: StoreClient) -> None:
    torch_store = CoordinatorStore(store)
    prefixed = PrefixStore("p", torch_store)  # goes through torch's C++ and back
    prefixed.set("k", "text")
    assert prefixed.get("k") == b"text"
    assert store.get("p/k") == b"text"
    assert prefixed.add("n", 3) == 3
    assert prefixed.check(["k", "n"])
    assert not prefixed.check(["absent"])
    assert prefixed.compare_set("k", "text", "new") == b"new"
    prefixed.wait(["k"], timedelta(seconds=1))
    assert torch_store.num_keys() == 2
    assert prefixed.delete_key("k")
    assert torch_store.timeout == timedelta(seconds=10)


def test_torch_learns_of_a_timeout(store: StoreClient) -> None:
    torch_store = CoordinatorStore(store)
    torch_store.set_timeout(timedelta(seconds=0.01))
    prefixed = PrefixStore("p", torch_store)
    with pytest.raises((StoreTimeoutError, RuntimeError), match="no value for p/absent within"):
        prefixed.get("absent")
    with pytest.raises((StoreTimeoutError, RuntimeError), match="no value for p/absent"):
        prefixed.wait(["absent"], timedelta(seconds=0.01))


def test_what_is_no_reply_is_a_broken_protocol(server: Server, store: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = Beat(phase="idle", seq=0, done_seq=0, step_id=0, memory_bytes=0)
    client = store._connection()
    monkeypatch.setattr(client, "receive", lambda timeout_s: (beat, []))
    with pytest.raises(ProtocolError, match="the store answered count with a Beat"):
        store.count()
