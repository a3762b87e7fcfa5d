"""Every kind of store that ranks use, and torch's view of ours; behind the client is the driver's own state machine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from support.store_server import StoreServer
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]  # torch's stubs do not export them
from torch.distributed.distributed_c10d import PrefixStore

from zspmd.errors import BadFrameError, PeerLostError, ProtocolError, StoreTimeoutError
from zspmd.transport.records import MAX_STORE_KEYS, MAX_STORE_VALUE_BYTES, Beat, Reject, StoreReply
from zspmd.workers import store_client
from zspmd.workers.store import PrefixedStore, Store, get_blobs, set_blob
from zspmd.workers.store_client import StoreClient
from zspmd.workers.torch_store import CoordinatorStore, TorchStoreAdapter


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with StoreServer() as made:
        yield made


@pytest.fixture
def store(server: StoreServer) -> StoreClient:
    return server.client()


@pytest.fixture(params=["client", "prefixed", "TCPStore", "HashStore", "there and back"])
def any_store(request: pytest.FixtureRequest) -> Store:
    """Every kind of ``Store``: the client, one with a prefix, torch's with and without its extended operations, and ours as torch's."""
    if request.param == "TCPStore":
        tcp_store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
        return TorchStoreAdapter(PrefixStore("p", tcp_store), timeout_s=10.0)
    if request.param == "HashStore":
        return TorchStoreAdapter(HashStore(), timeout_s=10.0)
    client: StoreClient = request.getfixturevalue("store")
    if request.param == "prefixed":
        return PrefixedStore(PrefixedStore(client, "outer"), "inner")
    return client if request.param == "client" else TorchStoreAdapter(CoordinatorStore(client), timeout_s=10.0)


def test_what_every_store_does(any_store: Store) -> None:
    any_store.set("k", b"\x00\xffv")
    assert any_store.get("k") == b"\x00\xffv"
    any_store.set("empty", b"")
    assert any_store.get_many(["empty", "k", "empty"]) == [b"", b"\x00\xffv", b""]
    assert any_store.get_many([]) == []
    any_store.wait(["k", "empty"])
    assert (any_store.check(["k", "empty"]), any_store.check(["k", "absent"])) == (True, False)
    assert [any_store.add("n", amount) for amount in (5, -7)] == [5, -2]
    assert any_store.compare_set("c", b"", b"one") == b"one"
    assert any_store.compare_set("c", b"other", b"two") == b"one"
    assert any_store.compare_set("c", b"one", b"two") == b"two"
    before = any_store.count()
    assert (any_store.delete("k"), any_store.delete("k")) == (True, False)
    assert any_store.delete_many(["empty", "absent", "c"]) == 2
    assert before - any_store.count() == 3
    assert any_store.timeout_s == 10.0


def test_every_store_names_the_absent_keys(any_store: Store) -> None:
    any_store.set("a", b"")
    for ask in (any_store.wait, any_store.get_many):
        with pytest.raises(StoreTimeoutError, match=r"no value for b, c within 0\.05 s") as caught:
            ask(["a", "b", "c"], timeout_s=0.05)
        assert caught.value.absent == ("b", "c")
    with pytest.raises(StoreTimeoutError) as caught:
        any_store.get("d", timeout_s=0.05)
    assert caught.value.absent == ("d",)


def test_every_store_refuses_a_value_that_is_too_large(any_store: Store) -> None:
    with pytest.raises(BadFrameError, match="has length 524289; the limit is 524288"):
        any_store.set("k", bytes(MAX_STORE_VALUE_BYTES + 1))
    any_store.set("k", bytes(MAX_STORE_VALUE_BYTES))
    assert len(any_store.get("k")) == MAX_STORE_VALUE_BYTES


def test_every_store_keeps_bytes_of_any_length(any_store: Store) -> None:
    sizes = [0, 1, MAX_STORE_VALUE_BYTES - 8, MAX_STORE_VALUE_BYTES - 7, 3 * MAX_STORE_VALUE_BYTES]
    blobs = [bytes([number]) * size for number, size in enumerate(sizes)]
    before = any_store.count()
    keys = [key for number, data in enumerate(blobs) for key in set_blob(any_store, f"blob{number}", data)]
    assert len(keys) == 1 + 1 + 1 + 2 + 4
    assert get_blobs(any_store, [f"blob{number}" for number in range(5)]) == blobs
    assert any_store.delete_many(keys) == len(keys)
    assert any_store.count() == before


def test_more_keys_than_one_request_takes(store: StoreClient) -> None:
    keys = [f"k{number}" for number in range(MAX_STORE_KEYS + 2)]
    for key in keys[:3]:
        store.set(key, key.encode())
    for ask in (store.wait, store.get_many):
        with pytest.raises(StoreTimeoutError) as caught:
            ask(keys, timeout_s=0.1)
        assert caught.value.absent == tuple(keys[3:])
    many = keys[:3] * MAX_STORE_KEYS
    assert store.get_many(many) == [key.encode() for key in many]
    assert store.check(many)
    assert not store.check([*many, "absent"])
    assert store.delete_many(many) == 3


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


def test_the_timeout_of_the_client_is_the_one_unless_said_otherwise(server: StoreServer) -> None:
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


def test_threads_wait_and_set_over_connections_of_their_own(server: StoreServer, store: StoreClient) -> None:
    num_threads = 8
    with ThreadPoolExecutor(num_threads + 1) as pool:
        waiting = [pool.submit(store.get, f"k{i}") for i in range(num_threads)]
        counts = [pool.submit(store.add, "n", 1)]
        for i in reversed(range(num_threads)):
            store.set(f"k{i}", b"%d" % i)
        assert [future.result() for future in waiting] == [b"%d" % i for i in range(num_threads)]
        counts += [pool.submit(store.add, "n", 1) for _ in range(99)]
        assert sorted(future.result() for future in counts) == list(range(1, 101))
    assert 2 <= len(server.requests) <= num_threads + 2


def test_a_late_reply_is_not_taken_for_the_next(server: StoreServer, store: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_connection_that_is_not_accepted(server: StoreServer, answer: Reject | StoreReply, error: type[Exception], words: str) -> None:
    server.answer = answer
    with pytest.raises(error, match=words):
        server.client().count()


def test_a_silent_driver_is_a_lost_peer(server: StoreServer, store: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(dist.DistStoreError, match="no value for p/absent within"):
        prefixed.get("absent")
    with pytest.raises(dist.DistStoreError, match="no value for p/absent"):
        prefixed.wait(["absent"], timedelta(seconds=0.01))


def test_the_loss_of_torchs_store_is_a_lost_peer() -> None:
    server = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=10), wait_for_workers=False)
    store = TorchStoreAdapter(client, timeout_s=10.0)
    store.set("k", b"")
    del server
    with pytest.raises(PeerLostError, match="torch's store is gone: "):
        store.check(["k"])


def test_what_is_no_reply_is_a_broken_protocol(server: StoreServer, store: StoreClient, monkeypatch: pytest.MonkeyPatch) -> None:
    beat = Beat(phase="idle", seq=0, done_seq=0, step_id=0, memory_bytes=0)
    client = store._connection()
    monkeypatch.setattr(client, "receive", lambda timeout_s: (beat, []))
    with pytest.raises(ProtocolError, match="the store answered count with a Beat"):
        store.count()
