"""Where a node that calls in looks for its driver, and what it needs for that."""

from __future__ import annotations

from typing import Any

import pytest

from zspmd.errors import ConfigError
from zspmd.runtime.launch.dial import dial_place
from zspmd.runtime.launch.dial.dial import dial_ports
from zspmd.runtime.launch.dial.dial_place import DialPlace, external_place, find_driver, manual_place
from zspmd.runtime.launch.dial.external import ExternalRank

SECRET = b"a secret of sixteen"
HERE = ExternalRank("torchrun", 1, 2, 1, 2, ("a",), "localhost")
SPREAD = ExternalRank("openmpi", 1, 4, 1, 2, ("a",))


def place(rank: ExternalRank, environment: dict[str, str] | None = None, **options: Any) -> DialPlace:
    given: dict[str, Any] = {"secret": None, "launch_id": None, "master_addr": "", "port": None}
    return external_place(rank, environment or {}, **{**given, **options})


def test_on_one_machine_nodes_find_each_other_by_a_file_on_loopback() -> None:
    found = place(HERE)
    assert (found.node_rank, found.num_nodes, found.num_slots, found.local_rank, found.local_world_size) == (1, 2, 1, 1, 2)
    assert (found.has_file, found.own_address(), found.launch_id) == (True, "127.0.0.1", HERE.launch_id)
    assert not place(HERE, secret=SECRET).has_file
    assert place(HERE, launch_id="given").launch_id == "given"


@pytest.mark.parametrize(
    ("rank", "environment", "options", "address"),
    [
        (SPREAD, {}, {"master_addr": "192.0.2.1"}, "192.0.2.1"),
        (ExternalRank("torchrun", 1, 4, 1, 2, ("a",), "192.0.2.2"), {}, {}, "192.0.2.2"),
        (ExternalRank("torchrun", 1, 4, 1, 2, ("a",), "192.0.2.2"), {}, {"master_addr": "192.0.2.3"}, "192.0.2.3"),
        (SPREAD, {"SLURM_STEP_NODELIST": "n[07-09,11],m1"}, {}, "n07"),
        (SPREAD, {"SLURM_STEP_NODELIST": "m1,n[07-09]"}, {}, "m1"),
    ],
    ids=["given", "the launcher's", "given above the launcher's", "Slurm's first of a range", "Slurm's first"],
)
def test_on_several_machines_the_driver_is_where_rank_0_is(
    rank: ExternalRank, environment: dict[str, str], options: dict[str, Any], address: str
) -> None:
    assert place(rank, environment, secret=SECRET, **options).master_addr == address


def test_several_machines_need_secret_and_address() -> None:
    with pytest.raises(ConfigError, match=r"openmpi has started 4 ranks, of which 2 are here; .* give all of them the same"):
        place(SPREAD, master_addr="192.0.2.1")
    with pytest.raises(ConfigError, match="openmpi does not tell where rank 0 is; give all ranks --master-addr"):
        place(SPREAD, secret=SECRET)


def by_hand(**changes: Any) -> DialPlace:
    given: dict[str, Any] = {"node_rank": 1, "num_nodes": 2, "num_slots": 4, "master_addr": "127.0.0.1", "port": None}
    return manual_place(**{**given, "secret": None, "launch_id": None, **changes})


def test_nodes_by_hand_derive_the_launch_id_from_what_they_share() -> None:
    assert by_hand().launch_id == by_hand(node_rank=0, num_slots=1).launch_id
    ids = {by_hand(**changes).launch_id for changes in ({}, {"port": 2345}, {"num_nodes": 3}, {"secret": SECRET}, {"launch_id": "own"})}
    assert len(ids) == 5
    assert by_hand(secret=SECRET).launch_id == by_hand(secret=SECRET, num_nodes=3).launch_id
    assert SECRET.decode() not in by_hand(secret=SECRET).launch_id


def test_nodes_by_hand_on_other_machines_need_a_secret() -> None:
    with pytest.raises(ConfigError, match=r"--master-addr is 192.0.2.1; nodes on several machines know each other by a secret"):
        by_hand(master_addr="192.0.2.1")
    assert by_hand(master_addr="192.0.2.1", secret=SECRET).master_addr == "192.0.2.1"


def test_a_name_that_leads_to_loopback_is_no_address_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_place, "check_bind_address", lambda bind: "127.0.1.1")
    with pytest.raises(ConfigError, match=r"node1 is 127.0.1.1 on this machine, which others cannot reach"):
        by_hand(master_addr="node1", secret=SECRET, node_rank=0).own_address()
    assert by_hand(master_addr="127.0.1.1", secret=SECRET).own_address() == "127.0.1.1"


def test_devices_are_those_of_the_local_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place(HERE).devices == ()
    monkeypatch.setattr(dial_place, "num_cuda_devices", lambda: 4)
    assert place(HERE).devices == (1,)
    assert by_hand(num_slots=3).devices == (0, 1, 2)
    monkeypatch.setattr(dial_place, "num_cuda_devices", lambda: 1)
    assert place(HERE).devices == (0,)  # its launcher shows each process its own


@pytest.mark.parametrize(("port", "num_tried"), [(None, 8), (2345, 1)], ids=["candidates", "given"])
async def test_a_driver_with_a_secret_is_looked_for_at_its_ports(port: int | None, num_tried: int) -> None:
    wanted = by_hand(secret=SECRET, port=port)
    out = await find_driver(wanted, timeout_s=1.0)
    ports = [port] if port else dial_ports(wanted.launch_id)
    assert out.endpoints == [f"tcp://127.0.0.1:{number}" for number in ports]
    assert len(ports) == num_tried
