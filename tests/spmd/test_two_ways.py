"""Groups whose ranks reach the driver in two ways at once: here in the run directory, elsewhere over TCP, with a relay or without.

The other node is this machine too: an agent that a stand-in for ssh starts, at an address that is not loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.groups import launch
from support.leaks import LeakCheck
from support.listening import accepted, listening
from support.polling import wait_until

import zspmd
from zspmd.config import NodesConfig
from zspmd.errors import PeerLostError, WorkerExitedError
from zspmd.runtime.launch.nodes.node_facts import own_addresses
from zspmd.transport.chunks import CHUNK_BYTES

RSH = """#!/bin/sh
shift
exec sh -c "$*"
"""
ELSEWHERE = "198.51.100.1"  # a host that nobody asks a name server for
LOCAL_RANK, REMOTE_RANKS = 0, (1, 2)
WORLD_SIZE = 3
relays = pytest.mark.parametrize("relay", ["on", "off"])


def own_address() -> str:
    """Return an address of this machine that others could use."""
    found = [entry.partition(" ")[2] for entry in own_addresses()]
    usable = [address for address in found if not address.startswith(("127.", "169.254.", "fe80:")) and address != "::1"]
    if not usable:
        pytest.skip("this machine has no address but loopback ones")
    return usable[0]


@pytest.fixture
async def two_ways(leak_check: LeakCheck, tmp_path: Path) -> AsyncIterator[Any]:
    """Hand out what launches a group with one rank here and two elsewhere."""
    rsh, address = tmp_path / "rsh", own_address()
    rsh.write_text(RSH)
    rsh.chmod(0o755)

    def make(worker: str, relay: str, **options: Any) -> zspmd.WorkerGroup:
        nodes = NodesConfig(rsh=str(rsh), allow_same_host=True, iface=f"{address}/{128 if ':' in address else 32}", relay=relay)
        hosts = [f"localhost slots=1 addr={address}", f"{ELSEWHERE} slots={len(REMOTE_RANKS)}"]
        return launch(worker, WORLD_SIZE, hosts=hosts, nodes=nodes, **options)

    yield make
    await asyncio.get_running_loop().shutdown_default_executor()  # names are resolved in its threads, which the loop keeps


@relays
async def test_steps_and_calls_in_order_on_all(two_ways: Any, relay: str) -> None:
    async with two_ways("Echo", relay, window=8) as group:
        pending = [await group.submit(number) for number in range(50)]
        infos = await group.call("info")
        assert [info["num_steps"] for info in infos] == [50] * WORLD_SIZE
        for number, reply in enumerate(pending):
            assert await reply == [{"rank": rank, "inputs": number} for rank in range(WORLD_SIZE)]
        statistics = group.statistics()
        assert (statistics.impostor_frames, statistics.foreign_frames, statistics.replayed_frames) == (0, 0, 0)


@relays
async def test_values_of_any_size_go_all_ways(two_ways: Any, relay: str) -> None:
    async with two_ways("Echo", relay) as group:
        for size in (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 << 20):
            array = np.arange(size, dtype=np.uint8)
            for answer in await group.step(array):
                np.testing.assert_array_equal(answer["inputs"], array)


@relays
async def test_each_rank_has_the_connections_of_its_place(two_ways: Any, relay: str) -> None:
    before = set(listening([os.getpid()]))
    async with two_ways("Echo", relay) as group:
        await group.step(None)
        assert len(set(listening([os.getpid()])) - before) == 3
        site = group._processes._site
        assert {rank for rank in range(WORLD_SIZE) if site.routes.is_relayed(rank)} == (set(REMOTE_RANKS) if relay == "on" else set())
        assert site.door is not None
        heard = site.door._heard
        assert {name for socket, name in heard if socket == "step"} == ({"n1"} if relay == "on" else {"1", "2"})
        assert {name for socket, name in heard if socket == "result"} == {"1", "2"}
        assert {name for socket, name in heard if socket == "control"} == {"1", "2"}


@relays
@pytest.mark.timeout(120)
async def test_lost_frames_are_sent_again_on_either_way(two_ways: Any, relay: str) -> None:
    num_steps = 500
    async with two_ways("Diary", relay, window=8, preload=("support.lossy",)) as group:
        pending: list[Any] = []
        for number in range(num_steps):
            pending.append(await group.submit(number))
        await asyncio.gather(*pending)
        assert await group.call("diary") == [list(range(num_steps))] * WORLD_SIZE
        assert group.statistics().replayed_frames > 0
        await wait_until(lambda: all(health.gaps for health in group.health()))


@relays
async def test_a_killed_rank_elsewhere_is_named(two_ways: Any, relay: str) -> None:
    group = two_ways("Echo", relay)
    await group.start()
    infos = await group.call("info")
    started = time.monotonic()
    os.kill(infos[2]["pid"], 9)
    with pytest.raises(WorkerExitedError) as caught:
        await _step_until(group, started + 20)
    assert caught.value.rank == 2
    assert time.monotonic() - started < 5.0
    await group.aclose(abort=True)


async def test_a_relay_that_loses_the_driver_ends_the_group(two_ways: Any) -> None:
    group = two_ways("Echo", "on")
    await group.start()
    await group.step(None)
    started = time.monotonic()
    _, port = group._processes.publisher.endpoints[0].rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        connection, *_ = [stack.enter_context(connection) for connection in accepted([int(port)])]  # that of the relay
        connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(PeerLostError, match=f"node 1 \\({ELSEWHERE}\\) takes no more steps: the step connection to the driver broke"):
        await _step_until(group, started + 20)
    assert time.monotonic() - started < 5.0
    await group.aclose(abort=True)


async def _step_until(group: zspmd.WorkerGroup, end: float) -> None:
    while time.monotonic() < end:
        await group.step(None)
