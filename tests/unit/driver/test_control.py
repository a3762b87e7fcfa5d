"""The control hub: who is admitted, what is refused and why, and what becomes of beats, progress and store requests."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import pytest
import zmq
from support.polling import wait_until

import zspmd
from zspmd.errors import BackpressureError, BadFrameError, PeerLostError, ProtocolError
from zspmd.runtime.driver.control import ControlHub, RankRecord
from zspmd.transport.control_sockets import ControlClient, ControlServer
from zspmd.transport.records import Accepted, Beat, ControlRecord, Failure, Hello, Progress, Reject, StoreReply, StoreRequest
from zspmd.transport.schema import pack_record

TOKEN = b"t" * 32
DEADLINE_S = 10.0


class Hub:
    """A hub of two ranks, what it called back, and clients of it."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.context, self.endpoint = context, endpoint
        self.hellos: list[int] = []
        self.progress: list[tuple[int, Progress | None]] = []
        self.errors: list[Exception] = []
        self.clients: list[ControlClient] = []
        self.hub = ControlHub(
            ControlServer(context, [endpoint]),
            token=TOKEN,
            world_size=2,
            on_hello=lambda rank: self.hellos.append(rank.rank),
            on_progress=self._on_progress,
            on_error=self.errors.append,
        )

    def _on_progress(self, rank: RankRecord) -> None:
        self.progress.append((rank.rank, rank.progress))

    def client(self) -> ControlClient:
        self.clients.append(ControlClient(self.context, self.endpoint))
        return self.clients[-1]

    def hello(self, **changes: Any) -> ControlClient:
        client = self.client()
        facts: dict[str, Any] = {"token": TOKEN, "rank": 0, "pid": 99, "host": "node3", "version": zspmd.__version__, "purpose": "rank"}
        client.send(Hello(**{**facts, **changes}))
        return client

    async def answer(self, client: ControlClient) -> ControlRecord:
        await wait_until(lambda: bool(client.socket.poll(0)))
        return client.receive(0)[0]

    def close(self) -> None:
        self.hub.close()
        self.hub.close()
        for client in self.clients:
            client.close()


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    with tempfile.TemporaryDirectory(prefix="z") as directory:
        made = Hub(zmq.Context(), f"ipc://{directory}/control")
        yield made
        made.close()
        made.context.destroy(linger=0)


async def test_a_rank_is_admitted_once(hub: Hub) -> None:
    hub.hello(rank=1)
    await wait_until(lambda: hub.hellos == [1])
    record = hub.hub.ranks[1]
    assert (record.pid, record.host, record.connection is not None) == (99, "node3", True)
    again = hub.hello(rank=1, pid=100)
    assert await hub.answer(again) == Reject(reason="rank 1 is connected already, as pid 99")
    assert hub.hellos == [1]
    assert [type(error) for error in hub.errors] == [ProtocolError]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token": b"u" * 32}, "the token is not this launch's"),
        ({"token": b""}, "the token is not this launch's"),
        ({"version": "0.0.1"}, f"the rank runs zspmd 0.0.1, the driver {zspmd.__version__}; install the same version"),
        ({"rank": 2}, "rank 2 is outside the world of 2"),
        ({"purpose": "shell"}, "purpose 'shell' is none of rank, beat, store, trace"),
        ({"token": b"u" * 32, "rank": 9, "version": "0"}, "the token is not this launch's"),
    ],
    ids=["wrong token", "no token", "another version", "outside the world", "unknown purpose", "token first"],
)
async def test_a_connection_is_refused_with_the_reason(hub: Hub, changes: dict[str, Any], words: str) -> None:
    client = hub.hello(**changes)
    assert await hub.answer(client) == Reject(reason=words)
    assert [str(error) for error in hub.errors] == [f"refused a control connection: {words}"]
    client.send(Beat(phase="idle", seq=0, done_seq=0, step_id=0, memory_bytes=0))
    await wait_until(lambda: len(hub.errors) == 2)
    assert str(hub.errors[1]) == "a Beat on a control connection that has not said hello"
    assert (hub.hellos, hub.hub.ranks[0].connection, hub.hub.ranks[0].beat) == ([], None, None)


async def test_a_refused_connection_that_is_gone_is_no_lost_peer(hub: Hub) -> None:
    for _ in range(20):
        hub.hello(token=b"").socket.close(linger=1000)
    await wait_until(lambda: len(hub.errors) == 20)
    assert not any(isinstance(error, PeerLostError) for error in hub.errors)


async def test_sending_to_a_connection_that_is_gone_is_forgotten(hub: Hub) -> None:
    hub.hub.send(b"\0none", Accepted())
    assert hub.errors == []


async def test_beats_and_progress_are_kept(hub: Hub) -> None:
    beat, progress = Beat(phase="step", seq=4, done_seq=3, step_id=2, memory_bytes=9), Progress(done=1, total=5, what="weights")
    client = hub.hello(purpose="beat", rank=1)
    client.send(beat)
    await wait_until(lambda: hub.hub.ranks[1].beat == beat)
    at = hub.hub.ranks[1].beat_at
    assert at is not None
    assert 0 <= asyncio.get_running_loop().time() - at < DEADLINE_S
    client.send(progress)
    await wait_until(lambda: hub.progress == [(1, progress)])
    assert (hub.hellos, hub.hub.ranks[0].beat, hub.errors) == ([], None, [])


@pytest.mark.parametrize(
    "record",
    [Accepted(), Failure(exception_type="", message="", traceback="", phase="", step_id=0), StoreReply(request_id=0)],
    ids=lambda record: type(record).__name__,
)
async def test_records_of_the_driver_are_refused(hub: Hub, record: ControlRecord) -> None:
    hub.hello(purpose="beat").send(record)
    await wait_until(lambda: bool(hub.errors))
    assert str(hub.errors[0]) == f"rank 0 sent a {type(record).__name__}, which only the driver sends"


async def test_rubbish_is_told_and_the_next_record_is_read(hub: Hub) -> None:
    client = hub.client()
    client.socket.send(b"rubbish")
    hub.hello(rank=1)
    await wait_until(lambda: hub.hellos == [1] and bool(hub.errors))
    assert [type(error) for error in hub.errors] == [BadFrameError]


async def test_a_connection_that_reads_nothing_costs_nobody_else_an_answer(hub: Hub) -> None:
    lazy = hub.context.socket(zmq.DEALER)
    lazy.set_hwm(100_000)
    lazy.setsockopt(zmq.RCVHWM, 1)
    lazy.setsockopt(zmq.LINGER, 0)
    lazy.connect(hub.endpoint)
    lazy.send(pack_record(Hello(token=TOKEN, rank=0, pid=99, host="node3", version=zspmd.__version__, purpose="store")))
    lazy.send(pack_record(StoreRequest(request_id=0, op="get", keys=("never",), timeout_s=0.2)))
    patient = await store(hub, 1)
    patient.send(StoreRequest(request_id=1, op="get", keys=("never",), timeout_s=0.2))
    request = pack_record(StoreRequest(request_id=0, op="?" * 16, keys=()))  # refused, in some 100 B
    for _ in range(20_000):
        lazy.send(request)
    await wait_until(lambda: bool(hub.errors))
    assert await hub.answer(patient) == StoreReply(request_id=1, absent=("never",))
    assert isinstance(hub.errors[0], BackpressureError)
    lazy.close()


async def store(hub: Hub, rank: int) -> ControlClient:
    client = hub.hello(purpose="store", rank=rank)
    assert await hub.answer(client) == Accepted()
    return client


async def test_the_store_frees_a_waiter_on_another_connection(hub: Hub) -> None:
    one, two = await store(hub, 0), await store(hub, 1)
    one.send(StoreRequest(request_id=1, op="get", keys=("k",), timeout_s=60.0))
    await wait_until(lambda: hub.hub.store.next_deadline() is not None)
    two.send(StoreRequest(request_id=7, op="set", keys=("k",), value=b"v"))
    assert await hub.answer(two) == StoreReply(request_id=7)
    assert await hub.answer(one) == StoreReply(request_id=1, value=b"v")


async def test_store_timeouts_come_by_themselves_and_in_order(hub: Hub) -> None:
    client = await store(hub, 0)
    for request_id, timeout_s in enumerate((0.05, 0.01, 0.03)):
        client.send(StoreRequest(request_id=request_id, op="get", keys=(f"k{request_id}",), timeout_s=timeout_s))
    replies = [await hub.answer(client) for _ in range(3)]
    assert replies == [StoreReply(request_id=i, absent=(f"k{i}",)) for i in (1, 2, 0)]


async def test_a_bad_store_request_is_answered_with_the_reason(hub: Hub) -> None:
    client = await store(hub, 0)
    client.send(StoreRequest(request_id=3, op="exec", keys=("k",)))
    reply = await hub.answer(client)
    assert isinstance(reply, StoreReply)
    assert (reply.request_id, reply.error[:23]) == (3, "store operation 'exec';")
    assert hub.errors == []


async def test_a_reply_that_would_be_too_long_is_an_error_of_its_own_and_the_next_timeout_comes(hub: Hub) -> None:
    """A request without the fields that may be left out holds more keys than the reply that names them."""
    client = await store(hub, 0)
    client.send(StoreRequest(request_id=2, op="get", keys=("later",), timeout_s=0.03))
    bare = msgpack.packb({"record": "StoreRequest", "request_id": 1, "op": "wait", "keys": ["k" * ((1 << 20) - 60)]})
    client.socket.send(bare)
    replies = [await hub.answer(client) for _ in range(2)]
    assert isinstance(replies[0], StoreReply)
    assert (replies[0].request_id, replies[0].error[:23]) == (1, "a StoreReply packs to 1")
    assert replies[1] == StoreReply(request_id=2, absent=("later",))


async def test_a_waiter_that_is_gone_costs_nobody_else_its_reply(hub: Hub) -> None:
    gone, waiting, setter = await store(hub, 0), await store(hub, 0), await store(hub, 1)
    for client in (gone, waiting):
        client.send(StoreRequest(request_id=1, op="get", keys=("k",), timeout_s=60.0))
    await wait_until(lambda: len(hub.hub.store._parked) == 2)
    gone.close()
    setter.send(StoreRequest(request_id=2, op="set", keys=("k",), value=b"v"))
    assert await hub.answer(waiting) == StoreReply(request_id=1, value=b"v")
    assert hub.errors == []
