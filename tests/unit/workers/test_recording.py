"""What a rank is told by its peers: written, handed out again in order, and checked against what is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.contexts import KeepingContext

from zspmd.errors import ConfigError, RecordingError, ReplayDivergedError, StoreTimeoutError
from zspmd.topology import AxisGroup
from zspmd.transport.control_sockets import ControlClient
from zspmd.transport.recorded_launch import rank_path
from zspmd.transport.records import Hello, StoreReply, StoreRequest
from zspmd.workers.communicators.communicator import Communicator
from zspmd.workers.communicators.recorded import RecordingCommunicator, ReplayedCommunicator
from zspmd.workers.communicators.solo import SoloCommunicator
from zspmd.workers.recording import EndOfRecording, PeerLog, RecordedPeers, RecordingStore, ReplayedStore
from zspmd.workers.store_client import StoreClient
from zspmd.workers.torch_bridge import register_torch

GROUP = AxisGroup("tp", (0,), 0)
register_torch()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run.zsr")


def open_peers(path: str, *, has_failed: bool = False) -> RecordedPeers:
    return RecordedPeers.open(path, 0, epoch=5, has_failed=has_failed)


def record(path: str, use: Callable[[Communicator], Any], *, is_closed: bool = True) -> Any:
    log, file = PeerLog.create(path, 0, epoch=5), Path(rank_path(path, 0))
    result = use(RecordingCommunicator(SoloCommunicator(GROUP), "tp", log))
    before = file.read_bytes()
    log.close()
    if not is_closed:
        file.write_bytes(before)
    return result


def replay(path: str, use: Callable[[Communicator], Any], **options: Any) -> Any:
    return use(ReplayedCommunicator(GROUP, "cpu", "tp", open_peers(path, **options)))


def use_all(communicator: Communicator) -> list[torch.Tensor]:
    """Use every collective that one rank alone has, with several dtypes and layouts."""
    strided = torch.arange(12.0).reshape(3, 4).T
    results = [
        communicator.all_reduce(strided.clone(memory_format=torch.preserve_format), "mean"),
        communicator.all_reduce(torch.arange(5000).bfloat16()),
        communicator.all_gather(strided),
        communicator.reduce_scatter(torch.ones(1, 3, dtype=torch.int64), "max"),
        communicator.broadcast(torch.tensor([1.0, float("nan")])),
        communicator.all_to_all(torch.arange(6).reshape(3, 2), send_counts=[3], receive_counts=[3]),
        torch.from_numpy(communicator.all_gather(np.arange(3.0))),
        communicator.all_reduce(torch.zeros(0)),
    ]
    communicator.barrier()
    return results


def two_barriers(communicator: Communicator) -> None:
    communicator.barrier()
    communicator.barrier()


def test_every_collective_returns_what_it_returned(path: str) -> None:
    recorded, replayed = record(path, use_all), replay(path, use_all)
    for one, other in zip(recorded, replayed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        assert one.dtype == other.dtype


def test_results_come_from_the_file_and_not_from_the_argument(path: str) -> None:
    record(path, lambda communicator: communicator.all_reduce(torch.full((3,), 7.0)))
    assert replay(path, lambda communicator: communicator.all_reduce(torch.zeros(3))).tolist() == [7.0, 7.0, 7.0]


@pytest.mark.parametrize(
    ("use", "asked"),
    [
        (lambda c: c.all_gather(torch.zeros(2)), r"all_gather\(\) of uint8 \[1, 8\]"),
        (lambda c: c.all_reduce(torch.zeros(2), "max"), r"all_reduce\(max\) of float32 \[2\]"),
        (lambda c: c.all_reduce(torch.zeros(3)), r"all_reduce\(sum\) of float32 \[3\]"),
        (lambda c: c.all_reduce(torch.zeros(2, dtype=torch.float64)), r"all_reduce\(sum\) of float64 \[2\]"),
        (lambda c: c.barrier(), r"barrier\(\)"),
    ],
    ids=["operation", "op", "shape", "dtype", "barrier"],
)
def test_another_collective_is_named_beside_the_recorded_one(path: str, use: Callable[[Communicator], Any], asked: str) -> None:
    record(path, lambda communicator: communicator.all_reduce(torch.zeros(2)))
    told = rf"rank 0 asks for {asked} as number 0 on tp; recorded is all_reduce\(sum\) of float32 \[2\]"
    with pytest.raises(ReplayDivergedError, match=told):
        replay(path, use)


def test_one_collective_more_diverges(path: str) -> None:
    record(path, lambda communicator: communicator.barrier())
    with pytest.raises(ReplayDivergedError, match=r"barrier\(\) as number 1 on tp; recorded are 1 in all"):
        replay(path, two_barriers)


@pytest.mark.parametrize(("has_failed", "is_closed"), [(True, True), (False, False)], ids=["launch failed", "rank was killed"])
def test_where_the_launch_failed_the_replay_ends(path: str, has_failed: bool, is_closed: bool) -> None:
    record(path, lambda communicator: communicator.barrier(), is_closed=is_closed)
    with pytest.raises(EndOfRecording, match=r"in barrier\(\), number 1 on tp, which the launch did not finish"):
        replay(path, two_barriers, has_failed=has_failed)


def test_each_communicator_has_an_order_of_its_own(path: str) -> None:
    log = PeerLog.create(path, 0, epoch=5)
    for name, value in [("tp", 1.0), ("dp", 2.0), ("tp", 3.0)]:
        RecordingCommunicator(SoloCommunicator(GROUP), name, log).all_reduce(torch.full((1,), value))
    log.close()
    peers = open_peers(path)
    taken = [(n, ReplayedCommunicator(GROUP, "cpu", n, peers).all_reduce(torch.zeros(1)).item()) for n in ("dp", "tp", "tp")]
    assert taken == [("dp", 2.0), ("tp", 1.0), ("tp", 3.0)]


@pytest.mark.parametrize(("rank", "epoch"), [(1, 5), (0, 6)], ids=["rank", "launch"])
def test_the_file_of_another_is_refused(path: str, rank: int, epoch: int) -> None:
    PeerLog.create(path, rank, epoch=epoch).close()
    Path(f"{path}.r{rank:05d}").rename(f"{path}.r00000")
    with pytest.raises(RecordingError, match=r"run\.zsr\.r00000 does not belong to rank 0 of this recording"):
        open_peers(path)


def test_a_file_that_is_there_is_kept(path: str) -> None:
    PeerLog.create(path, 0, epoch=5).close()
    with pytest.raises(ConfigError, match=r"rank 0 cannot record its collectives: .*File exists"):
        PeerLog.create(path, 0, epoch=5)


class AnsweringStore(StoreClient):
    """A store client that needs no driver."""

    def _exchange(self, request: StoreRequest) -> StoreReply:
        return StoreReply(
            request_id=request.request_id, value=b"for " + request.keys[0].encode(), absent=request.keys if request.op == "wait" else ()
        )


@pytest.fixture
def context() -> Iterator[KeepingContext]:
    made = KeepingContext()
    yield made
    made.destroy(linger=0)


def test_the_store_answers_as_it_did(path: str, monkeypatch: pytest.MonkeyPatch, context: KeepingContext) -> None:
    monkeypatch.setattr(StoreClient, "_exchange", AnsweringStore._exchange)
    nobody = Hello(token=b"", rank=0, pid=0, host="", version="", purpose="store")
    log = PeerLog.create(path, 0, epoch=5)
    store = RecordingStore(log, StoreClient(lambda: ControlClient(context, "inproc://nobody"), nobody, timeout_s=3.0))
    assert store.get("a") == b"for a"
    with pytest.raises(StoreTimeoutError):
        store.wait(["b"])
    log.close()
    replayed = ReplayedStore(open_peers(path), timeout_s=3.0)
    assert replayed.get("a") == b"for a"
    with pytest.raises(StoreTimeoutError) as absent:
        replayed.wait(["b"])
    assert absent.value.absent == ("b",)
    with pytest.raises(ReplayDivergedError, match=r"get\(c\) as number 2 on the store; recorded are 2 in all"):
        replayed.get("c")


def test_a_second_thread_has_no_store(path: str) -> None:
    PeerLog.create(path, 0, epoch=5).close()
    store, told = ReplayedStore(open_peers(path), timeout_s=3.0), []

    def ask() -> None:
        try:
            store.get("a")
        except RecordingError as error:
            told.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert told == ["store operation get of a second thread: only the main thread's are recorded; replay all ranks"]
