"""What every coordinator must do, between real processes: over the store of a zspmd launch, and over plain torch.distributed."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.coordinator_ranks import LAUNCH_ID, CoordinatorRanks
from support.groups import DEADLINES
from support.leaks import LeakCheck
from support.torch_exits import run_to_its_end

import zspmd

KINDS = ["store", "torch"]
WORLD_SIZE, LOCAL_WORLD_SIZE = 4, 2
SHORT_S = 0.3  # for what is to time out


@pytest.fixture(scope="module", params=KINDS)
def ranks(request: pytest.FixtureRequest) -> Iterator[CoordinatorRanks]:
    """Four ranks on two nodes that serve all tests of a kind: they take long to start. Each test leaves them in step."""
    with LeakCheck() as leaks:
        with CoordinatorRanks(request.param, WORLD_SIZE, LOCAL_WORLD_SIZE) as made:
            barrier(made)  # has every rank connect
            yield made
        leaks.check()


@pytest.fixture
def mortals(request: pytest.FixtureRequest) -> Iterator[CoordinatorRanks]:
    """Three ranks that a test may kill."""
    with LeakCheck() as leaks:
        with CoordinatorRanks(request.param, 3, 3) as made:
            yield made
        leaks.check()


def timed_out(answer: dict[str, Any]) -> list[int]:
    """Return the ranks that a timeout names, which must be in its text as well."""
    assert answer["error"] == "CoordinatorTimeoutError", answer
    absent: list[int] = answer["absent"]
    assert f"{', '.join(map(str, absent))} ha" in answer["message"]
    return absent


def test_facts(ranks: CoordinatorRanks) -> None:
    facts = ranks.all("facts")
    for rank, found in enumerate(facts):
        assert (found["rank"], found["world_size"], found["local_rank"], found["local_world_size"]) == (rank, 4, rank % 2, 2)
        assert (found["is_master"], found["is_local_master"]) == (rank == 0, rank % 2 == 0)
        assert found["host"]
    (launch_id,) = {found["launch_id"] for found in facts}
    assert (launch_id == LAUNCH_ID) if ranks.kind == "store" else launch_id


@pytest.mark.parametrize("src", range(WORLD_SIZE))
@pytest.mark.parametrize("data", [b"", b"\x00\xff text", bytes(range(256)) * 20_000], ids=["empty", "short", "5 MB"])
def test_broadcast(ranks: CoordinatorRanks, src: int, data: bytes) -> None:
    for rank in range(WORLD_SIZE):
        ranks.tell(rank, "broadcast", data if rank == src else None, src)
    assert all(ranks.hear(rank) == data for rank in range(WORLD_SIZE))


@pytest.mark.parametrize("sizes", [(0, 0, 0, 0), (0, 1, 2, 3), (1_000_000, 0, 5, 600_000)], ids=["empty", "short", "large"])
def test_all_gather(ranks: CoordinatorRanks, sizes: tuple[int, ...]) -> None:
    shares = [bytes([rank + 1]) * size for rank, size in enumerate(sizes)]
    for rank, share in enumerate(shares):
        ranks.tell(rank, "all_gather", share)
    assert all(ranks.hear(rank) == shares for rank in range(WORLD_SIZE))


def barrier(ranks: CoordinatorRanks) -> None:
    assert ranks.all("barrier") == [None] * ranks.world_size


def test_nobody_leaves_a_barrier_before_all_are_in(ranks: CoordinatorRanks) -> None:
    early = [0, 1, 3]
    for rank in early:
        ranks.tell(rank, "barrier")
    for rank in early:
        with pytest.raises(TimeoutError):
            ranks.hear(rank, SHORT_S)
    assert ranks.some([2], "barrier") == [None]
    assert [ranks.hear(rank) for rank in early] == [None] * 3


def test_a_local_barrier_is_among_the_ranks_of_a_node(ranks: CoordinatorRanks) -> None:
    for _ in range(3):
        assert ranks.some([2, 3], "local_barrier") == [None, None]
    ranks.tell(0, "local_barrier")
    with pytest.raises(TimeoutError):
        ranks.hear(0, SHORT_S)
    assert ranks.some([1], "local_barrier") == [None]
    assert ranks.hear(0) is None
    for _ in range(2):
        assert ranks.some([0, 1], "local_barrier") == [None, None]


TIMEOUTS: list[tuple[str, list[Any], list[int], list[int]]] = [
    # operation, arguments, who comes, whom they miss
    ("barrier", [], [0, 2], [1, 3]),
    ("all_gather", [b"x"], [0, 2, 3], [1]),
    ("broadcast", [b"x", 2], [2], [0, 1, 3]),
    ("broadcast", [b"x", 1], [0, 2, 3], [1]),
    ("local_barrier", [], [3], [2]),
]


@pytest.mark.parametrize(
    ("operation", "arguments", "present", "absent"),
    TIMEOUTS,
    ids=["barrier", "all_gather", "broadcast, at its source", "broadcast without its source", "local_barrier"],
)
def test_a_timeout_names_exactly_the_absent_ranks_and_can_be_waited_on(
    ranks: CoordinatorRanks, operation: str, arguments: list[Any], present: list[int], absent: list[int]
) -> None:
    for _ in range(2):
        answers = ranks.some(present, operation, *arguments, timeout_s=SHORT_S)
        assert [timed_out(answer) for answer in answers] == [absent] * len(present)
    everybody = [2, 3] if operation == "local_barrier" else range(WORLD_SIZE)
    expected = {"barrier": None, "local_barrier": None, "all_gather": [b"x"] * WORLD_SIZE, "broadcast": b"x"}[operation]
    assert ranks.some(everybody, operation, *arguments) == [expected] * len(everybody)
    barrier(ranks)


WRONG: list[tuple[str, list[Any], dict[str, Any], str, str]] = [
    ("broadcast", [b"", 4], {}, "TopologyError", "src is 4; the ranks are 0 to 3"),
    ("broadcast", [b"", -1], {}, "TopologyError", "src is -1"),
    ("broadcast", [b"", True], {}, "TopologyError", "src is True"),
    ("broadcast", [None, 1], {}, "TypeError", "broadcast got a NoneType; give it bytes"),
    ("all_gather", ["text"], {}, "TypeError", "all_gather got a str; give it bytes"),
    ("all_gather", [None], {}, "TypeError", "all_gather got a NoneType"),
    ("all_gather", [bytes((16 << 20) + 1)], {}, "ValueError", "all_gather of 16777217 B; the limit is 16777216 B a rank"),
    ("barrier", [], {"timeout_s": 0}, "ConfigError", "timeout_s is 0; it must be a number of seconds above 0"),
    ("broadcast", [b"", 1], {"timeout_s": "1"}, "ConfigError", "timeout_s is '1'"),
]


@pytest.mark.parametrize(
    ("operation", "arguments", "options", "error", "message"), WRONG, ids=[f"{case[0]}: {case[4][:24]}" for case in WRONG]
)
def test_wrong_use_is_told_at_once(
    ranks: CoordinatorRanks, operation: str, arguments: list[Any], options: dict[str, Any], error: str, message: str
) -> None:
    """Nothing was announced, so that the ranks are still in step."""
    (answer,) = ranks.some([1], operation, *arguments, **options)
    assert (answer["error"], answer["message"][: len(message)]) == (error, message)
    barrier(ranks)


def test_the_store_does_not_grow(ranks: CoordinatorRanks) -> None:
    ranks.all("churn", 8)
    before = ranks.some([0], "count_keys")
    assert ranks.all("churn", 50) == [None] * WORLD_SIZE
    assert ranks.some([0], "count_keys") == before
    assert before[0] < 20 * WORLD_SIZE


def test_a_second_coordinator_has_operations_of_its_own(ranks: CoordinatorRanks) -> None:
    for _ in range(2):
        assert ranks.all("from_env_again") == [[b"0", b"1", b"2", b"3"]] * WORLD_SIZE
    barrier(ranks)


@pytest.mark.keeps_descriptors("the process groups of the ranks keep their connections")
def test_process_groups_of_torch_meet_in_its_store(ranks: CoordinatorRanks) -> None:
    sums = ranks.all("sum_with_torch")
    assert sums == [[6.0, 1.0], [6.0, 1.0], [6.0, 2.0], [6.0, 3.0]]
    with socket.socket() as probe:
        is_served = probe.connect_ex(("127.0.0.1", ranks.master_port)) == 0
    assert is_served == (ranks.kind == "torch")  # a zspmd launch needs no TCPStore


def test_use_after_close(ranks: CoordinatorRanks) -> None:
    operations = ["barrier", "local_barrier", "broadcast", "all_gather", "torch_store"]
    assert ranks.all("use_after_close") == [dict.fromkeys(operations, "ClosedError")] * WORLD_SIZE


@pytest.mark.parametrize("mortals", ["store", pytest.param("torch", marks=pytest.mark.long)], indirect=True)
def test_a_death_is_named_at_the_timeout(mortals: CoordinatorRanks) -> None:
    """Rank 1 dies inside a barrier that it had entered: the others may leave that one, and miss it in the next."""
    barrier(mortals)
    mortals.tell(1, "barrier")
    assert mortals.some([0], "wait", "barrier/1/1") == [None]
    mortals.kill(1)
    (answer,) = mortals.some([0], "barrier", timeout_s=SHORT_S)
    assert timed_out(answer) == [2]
    assert mortals.some([0, 2], "barrier") == [None, None]
    assert [timed_out(answer) for answer in mortals.some([0, 2], "barrier", timeout_s=SHORT_S)] == [[1], [1]]


@pytest.mark.parametrize("mortals", ["torch"], indirect=True)
def test_the_loss_of_a_peer_or_of_torchs_store_is_told_at_once(mortals: CoordinatorRanks) -> None:
    assert mortals.all("all_gather", b"x") == [[b"x"] * 3] * 3
    assert mortals.some([2], "set", "all_gather/1/2", b"") == [None]
    mortals.kill(2)  # between announcing itself and taking part in gloo's collective
    for answer in mortals.some([0, 1], "all_gather", b"x"):
        assert (answer["error"], answer["message"][:5]) == ("PeerLostError", "gloo:")
    assert mortals.some([1], "set", "all_gather/2/2", b"") == [None]
    for answer in mortals.some([0, 1], "all_gather", b"x"):
        assert (answer["error"], answer["message"][:19]) == ("PeerLostError", "gloo failed before:")
    mortals.kill(0)
    (answer,) = mortals.some([1], "barrier")
    assert (answer["error"], answer["message"][:21]) == ("PeerLostError", "torch's store is gone")


TORCHRUN_PROGRAM = """
import torch, torch.distributed as dist, zspmd
before = zspmd.Coordinator.from_env(timeout_s=60)
gathered = before.all_gather(b"%d" % before.local_rank)
dist.init_process_group("gloo")
after = zspmd.Coordinator.from_env(timeout_s=60)
for coordinator in (before, after):
    assert (coordinator.rank, coordinator.world_size) == (dist.get_rank(), dist.get_world_size())
    assert coordinator.broadcast(b"word" if coordinator.is_master else None) == b"word"
    total = torch.ones(1)
    dist.all_reduce(total)
    coordinator.close()
dist.all_reduce(total)
dist.destroy_process_group()
print(before.launch_id, gathered, total.item())
"""


def test_under_torchrun_beside_the_default_group(leak_check: LeakCheck, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(TORCHRUN_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--tee=1", str(program)]
    done = run_to_its_end(command, timeout=60, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stderr
    lines = sorted(line.partition("]:")[2].split(maxsplit=1) for line in done.stdout.splitlines() if "]:" in line)
    (first, second) = lines
    assert first == second
    assert first[1] == "[b'0', b'1'] 4.0"


async def test_a_worker_has_one(leak_check: LeakCheck) -> None:
    worker = "support.coordinated:Coordinated"
    async with zspmd.launch(worker, world_size=3, output_ranks="all", preload=(), deadlines=DEADLINES) as group:
        facts = await group.call("facts")
        assert facts == [[group.launch_id, rank, 3, rank, 3, "cpu", True] for rank in range(3)]
        assert await group.call("exchange", b"word", 1) == [[b"word", [b"0", b"1", b"2"]]] * 3
        assert await group.call("exchange_by_another", b"word", 2) == [[b"word", [b"0", b"1", b"2"]]] * 3
        for answer in await group.call("in_a_child"):
            assert answer.startswith("ConfigError: this process was started by a rank")
        assert await group.call("absent", 0.2, ranks=[0, 2]) == [[1], [1]]
