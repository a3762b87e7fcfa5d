"""The coordinator over a store, its ranks as threads: what it costs, what it leaves, and where it may not be made.

What it does is in ``tests/spmd/test_coordinators.py``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
from support.store_server import StoreServer
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch's stubs do not export it

import zspmd
from zspmd.errors import ConfigError, CoordinatorTimeoutError, EndpointInUseError, PeerLostError, TopologyError
from zspmd.process import BOOTSTRAP_FD
from zspmd.runtime.launch.rank_starting import bootstrap_file
from zspmd.transport.records import Accepted, Bootstrap
from zspmd.transport.schema import pack_record
from zspmd.workers import bootstrap, torch_coordinator
from zspmd.workers.context import RankFacts
from zspmd.workers.coordinator import Deadline
from zspmd.workers.store_coordinator import StoreCoordinator
from zspmd.workers.torch_store import TorchStoreAdapter

T = TypeVar("T")
TIMEOUT_S = 60.0
TORCH_FACTS = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
ALL_FACTS = (
    *TORCH_FACTS,
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "ZSPMD_LAUNCH_ID",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
    BOOTSTRAP_FD,
)


@pytest.fixture
def server() -> Iterator[StoreServer]:
    with StoreServer() as made:
        yield made


def run_ranks(server: StoreServer, world_size: int, program: Callable[[zspmd.Coordinator], T]) -> list[T]:
    """Run a program as that many ranks of one node, a thread each, and return what they return."""

    def run(rank: int) -> T:
        facts = RankFacts("launch", rank, world_size, rank, world_size, "host", "cpu")
        with StoreCoordinator(facts, server.client(TIMEOUT_S), name="0", timeout_s=TIMEOUT_S) as coordinator:
            return program(coordinator)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


OPERATIONS: dict[str, Callable[[zspmd.Coordinator], object]] = {
    "barrier": lambda coordinator: coordinator.barrier(),
    "local_barrier": lambda coordinator: coordinator.local_barrier(),
    "all_gather": lambda coordinator: coordinator.all_gather(b"share"),
    "broadcast": lambda coordinator: coordinator.broadcast(b"data"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_of_64_ranks_takes_each_three_requests_at_most(server: StoreServer, operation: str) -> None:
    rounds = 3
    answers = run_ranks(server, 64, lambda coordinator: [OPERATIONS[operation](coordinator) for _ in range(rounds)])
    assert answers == answers[:1] * 64
    assert len(server.requests) == 64
    assert max(server.requests.values()) <= 3 * rounds


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_many_operations_leave_two_keys_a_rank(server: StoreServer, operation: str, count: int) -> None:
    def program(coordinator: zspmd.Coordinator) -> int:
        for _ in range(count):
            OPERATIONS[operation](coordinator)
        coordinator.barrier()
        return coordinator.store.count()

    counts = run_ranks(server, 2, program)
    assert max(counts) <= 2 * 2 + 2  # and those of the last barrier


def test_coordinators_of_other_names_do_not_meet(server: StoreServer) -> None:
    facts = RankFacts("launch", 0, 2, 0, 2, "host", "cpu")
    for name in "ab":
        coordinator = StoreCoordinator(facts, server.client(), name=name, timeout_s=0.05)
        with pytest.raises(CoordinatorTimeoutError, match=r"barrier: rank 1 has not come within 0\.05 s") as caught:
            coordinator.barrier()
        assert (caught.value.absent, caught.value.operation) == ((1,), "barrier")
    assert sorted(server.state.values) == ["coordinator/a/barrier/0/0", "coordinator/b/barrier/0/0"]


def test_many_absent_ranks_are_counted_in_the_text(server: StoreServer) -> None:
    facts = RankFacts("launch", 0, 20, 0, 20, "host", "cpu")
    with pytest.raises(CoordinatorTimeoutError, match=r"ranks 1, 2, .*, 16 and 3 more have not come") as caught:
        StoreCoordinator(facts, server.client(), name="a", timeout_s=0.05).barrier()
    assert caught.value.absent == tuple(range(1, 20))


@pytest.fixture
def no_rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher's facts, in a process that has been handed nothing."""
    for name in ALL_FACTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bootstrap, "_taken", None)
    return monkeypatch


WRONG_FACTS: list[tuple[dict[str, str], type[Exception], str]] = [
    ({}, ConfigError, r"lacks RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; start it with `zspmd-run -n 2 script\.py` or torchrun"),
    ({**TORCH_FACTS, "MASTER_ADDR": ""}, ConfigError, "lacks MASTER_ADDR; start it"),
    ({**TORCH_FACTS, "MASTER_PORT": "http"}, ConfigError, "variable MASTER_PORT is 'http'; a launcher sets it to a whole number"),
    ({**TORCH_FACTS, "MASTER_PORT": "65536"}, ConfigError, "MASTER_PORT is 65536; a port is 1 to 65535"),
    ({**TORCH_FACTS, "MASTER_ADDR": "no such host"}, ConfigError, "MASTER_ADDR is 'no such host', which cannot be reached"),
    ({**TORCH_FACTS, "RANK": "-1"}, ConfigError, "variable RANK is '-1'"),
    ({**TORCH_FACTS, "RANK": "1"}, TopologyError, "RANK is 1 and WORLD_SIZE 1; ranks count from 0"),
    ({"ZSPMD_LAUNCH_ID": "x"}, ConfigError, "this process was started by a rank .of launch 'x'. and is none itself"),
    ({BOOTSTRAP_FD: "991"}, ConfigError, f"{BOOTSTRAP_FD} is '991', which is not the launcher's file here"),
    ({BOOTSTRAP_FD: "0"}, ConfigError, f"{BOOTSTRAP_FD} is '0', which is not the launcher's file here"),
    ({BOOTSTRAP_FD: "x"}, ConfigError, f"{BOOTSTRAP_FD} is 'x', which is not the launcher's file here"),
]


@pytest.mark.parametrize(("facts", "error", "words"), WRONG_FACTS, ids=[case[2][:30] for case in WRONG_FACTS])
def test_a_process_that_is_no_rank_is_told_what_is_wrong(
    no_rank: pytest.MonkeyPatch, facts: dict[str, str], error: type[Exception], words: str
) -> None:
    for name, value in facts.items():
        no_rank.setenv(name, value)
    with pytest.raises(error, match=words):
        zspmd.Coordinator.from_env(timeout_s=1.0)


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_timeout_must_be_a_number_of_seconds(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="it must be a number of seconds above 0"):
        zspmd.Coordinator.from_env(timeout_s=timeout_s)


def hand_over(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    fd = bootstrap_file(data)
    assert fd is not None
    monkeypatch.setenv(BOOTSTRAP_FD, str(fd))


def test_the_record_is_taken_once_and_kept(no_rank: pytest.MonkeyPatch) -> None:
    record = Bootstrap(launch_id="l", control_endpoint="ipc://x", token=b"t")
    hand_over(no_rank, pack_record(record))
    assert bootstrap.is_launched()
    assert [bootstrap.read_bootstrap() for _ in range(2)] == [record] * 2
    assert BOOTSTRAP_FD not in os.environ


@pytest.mark.parametrize(
    ("data", "words"), [(b"?", "cannot be read: "), (pack_record(Accepted()), "is a Accepted")], ids=["no record", "another"]
)
def test_a_handed_over_record_that_is_none(no_rank: pytest.MonkeyPatch, data: bytes, words: str) -> None:
    hand_over(no_rank, data)
    with pytest.raises(ConfigError, match=f"the launcher's bootstrap {words}"):
        bootstrap.read_bootstrap()


def test_a_fork_of_a_rank_is_told_so(no_rank: pytest.MonkeyPatch) -> None:
    no_rank.setenv("RANK", "3")
    no_rank.setattr(bootstrap, "_taken", (os.getpid() + 1, Bootstrap(launch_id="l", control_endpoint="ipc://x", token=b"t")))
    with pytest.raises(ConfigError, match=r"this process was forked by rank 3 .* which alone may speak for the rank"):
        zspmd.Coordinator.from_env()


def test_facts_of_the_environment_must_be_numbers(no_rank: pytest.MonkeyPatch) -> None:
    hand_over(no_rank, pack_record(Bootstrap(launch_id="l", control_endpoint="ipc:///nowhere", token=b"t")))
    with pytest.raises(ConfigError, match="variable RANK is ''"):
        zspmd.Coordinator.from_env()


@pytest.fixture
def launcher(no_rank: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of the only rank of another launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    for name, value in {**TORCH_FACTS, "MASTER_PORT": str(port)}.items():
        no_rank.setenv(name, value)
    return no_rank


def test_places_are_found_where_another_launcher_does_not_tell_them(launcher: pytest.MonkeyPatch) -> None:
    with zspmd.Coordinator.from_env(timeout_s=TIMEOUT_S) as first, zspmd.Coordinator.from_env(timeout_s=TIMEOUT_S) as second:
        assert (first.local_rank, first.local_world_size, first.is_master, first.is_local_master) == (0, 1, True, True)
        assert len(first.launch_id) == 16
        assert first.all_gather(b"x") == [b"x"]
        assert second.broadcast(b"y") == b"y"


@pytest.mark.parametrize(
    ("others", "place"),
    [(["other", "mine"], (1, 2)), (["mine", "mine"], (2, 3)), (["other", "third"], (0, 1)), (["mine", "other"], None)],
    ids=["the last two", "all", "alone", "not side by side"],
)
def test_a_place_follows_from_the_machines_of_all_ranks(
    launcher: pytest.MonkeyPatch, others: list[str], place: tuple[int, int] | None
) -> None:
    """Rank 2 of 3, while ``others`` says where ranks 0 and 1 are."""
    store = TorchStoreAdapter(HashStore(), timeout_s=TIMEOUT_S)
    torch_coordinator._find_facts(store, 0, 1, Deadline(TIMEOUT_S))
    mine = store.get("machine/0")
    store.set("launch_id/0", b"id")
    for rank, machine in enumerate(others):
        store.set(f"machine/{rank}", mine if machine == "mine" else machine.encode())
    if place is None:
        with pytest.raises(TopologyError, match="do not follow each other; have the launcher place ranks in blocks"):
            torch_coordinator._find_facts(store, 2, 3, Deadline(TIMEOUT_S))
    else:
        facts = torch_coordinator._find_facts(store, 2, 3, Deadline(TIMEOUT_S))
        assert (facts.launch_id, facts.local_rank, facts.local_world_size) == ("id", *place)


@pytest.mark.parametrize(("run_id", "is_kept"), [("none", False), ("my-run", True)])
def test_torchruns_id_is_the_launch_id_if_there_is_one(launcher: pytest.MonkeyPatch, run_id: str, is_kept: bool) -> None:
    launcher.setenv("TORCHELASTIC_RUN_ID", run_id)
    with zspmd.Coordinator.from_env(timeout_s=TIMEOUT_S) as coordinator:
        assert (coordinator.launch_id == run_id) == is_kept


MISFITS: list[tuple[dict[str, str], type[Exception], str]] = [
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, TopologyError, "rank 0 of 1 cannot be 1 of 1 on its node"),
    ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, TopologyError, "rank 0 of 1 cannot be 0 of 2 on its node"),
    ({"WORLD_SIZE": "3"}, CoordinatorTimeoutError, "finding the ranks of this node: ranks 1, 2 have not come within"),
    ({"WORLD_SIZE": "2", "RANK": "1"}, CoordinatorTimeoutError, "connecting to 127.0.0.1:.*: rank 0 has not come within"),
    ({"TORCHELASTIC_USE_AGENT_STORE": "True"}, PeerLostError, "torchrun's agent does not serve the store on 127.0.0.1:"),
]


@pytest.mark.parametrize(("facts", "error", "words"), MISFITS, ids=[" ".join(f"{k}={v}" for k, v in case[0].items()) for case in MISFITS])
def test_a_launch_that_does_not_come_about(launcher: pytest.MonkeyPatch, facts: dict[str, str], error: type[Exception], words: str) -> None:
    for name, value in facts.items():
        launcher.setenv(name, value)
    with pytest.raises(error, match=words):
        zspmd.Coordinator.from_env(timeout_s=0.5)


def test_a_port_that_somebody_has(launcher: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        launcher.setenv("MASTER_PORT", str(other.getsockname()[1]))
        with pytest.raises(EndpointInUseError, match=r"rank 0 cannot serve the store on 127\.0\.0\.1:"):
            zspmd.Coordinator.from_env(timeout_s=0.5)
