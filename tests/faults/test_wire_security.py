"""What strangers, stale workers, liars and broken links do to a group on TCP: nothing, or an error that names the rank."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import statistics
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq
from support.contexts import KeepingContext
from support.forger import ANSWER, FORGER, GARBAGE, HELLO
from support.groups import launch
from support.leaks import LeakCheck
from support.listening import accepted, listening
from support.memory import peak_bytes, reset_peak
from support.polling import wait_until

import zspmd
from zspmd.errors import ProtocolError, ReadyTimeoutError, WorkerExitedError
from zspmd.transport import control_sockets, sockets
from zspmd.transport.door import Door
from zspmd.transport.frames import ResultKind
from zspmd.transport.security import RankKeys
from zspmd.transport.sockets import ResultPusher

LOOPBACK = "127.0.0.1"
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
ROOM_BYTES = 64 << 20
QUIET = zspmd.Deadlines(beat_s=60.0, ready_s=60.0, step_s=90.0, collective_s=90.0, drain_s=5.0, kill_s=2.0)


def door_of(group: zspmd.WorkerGroup) -> Door:
    door = group._processes._site.door
    assert door is not None
    return door


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what this process's driver decodes from now on: one entry for each message."""
    calls: list[str] = []
    for module, name in ((sockets, "parse_result"), (control_sockets, "unpack_record")):
        real = getattr(module, name)

        def counted(*args: object, real: object = real, name: str = name) -> object:
            calls.append(name)
            return real(*args)  # type: ignore[operator]

        monkeypatch.setattr(module, name, counted)
    return calls


def pusher_to(context: zmq.Context[zmq.Socket[bytes]], group: zspmd.WorkerGroup, keys: RankKeys) -> ResultPusher:
    return ResultPusher(context, group._processes.collector.endpoints[0], epoch=group._processes._epoch, rank=0, keys=keys)


@contextlib.contextmanager
def context_of_a_stranger() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context = KeepingContext()
    try:
        yield context
    finally:
        context.destroy(linger=0)


async def test_a_stranger_with_an_unlisted_key_is_not_heard(leak_check: LeakCheck, decoded: list[str]) -> None:
    async with launch("Echo", 2, bind=LOOPBACK, deadlines=QUIET) as group:
        public, secret = zmq.curve_keypair()
        decoded.clear()
        with context_of_a_stranger() as context:
            pusher_to(context, group, RankKeys(public, secret, door_of(group).rank_keys(0).server)).push(ResultKind.ACK, 1)
            await wait_until(lambda: door_of(group).refused)
            assert decoded == []
            assert len(await group.step("unharmed")) == 2
        assert any(event.kind == "refused" and "none of this launch" in event.detail for event in group._events._events)


async def test_a_worker_of_an_earlier_launch_is_not_heard(leak_check: LeakCheck, decoded: list[str]) -> None:
    async with launch("Echo", 1, bind=LOOPBACK) as group:
        stale = door_of(group).rank_keys(0)
    async with launch("Echo", 1, bind=LOOPBACK, deadlines=QUIET, launch_id=group.launch_id) as again:
        decoded.clear()
        with context_of_a_stranger() as context:
            pusher = pusher_to(context, again, stale)
            monitor = pusher.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, "inproc://stale")
            pusher.push(ResultKind.ACK, 1)
            await wait_until(lambda: monitor.poll(0))
            assert decoded == []
            assert await again.step("unharmed") == [{"rank": 0, "inputs": "unharmed"}]


@pytest.mark.parametrize(("lie", "where"), [(ANSWER, "a OUTPUT"), (HELLO, "a Hello")], ids=str)
async def test_a_rank_that_speaks_for_another_is_not_heard(
    leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch, lie: str, where: str
) -> None:
    monkeypatch.setenv(FORGER, lie)
    async with launch("Echo", 2, bind=LOOPBACK, preload=("support.forger",)) as group:
        for number in range(3):
            assert await group.step(number) == [{"rank": rank, "inputs": number} for rank in range(2)]
        await wait_until(lambda: group.statistics().impostor_frames >= (3 if lie == ANSWER else 1))
        told = [event for event in group._events._events if event.kind == "impostor"]
        assert {event.rank for event in told} == {1}
        assert told[0].detail.startswith(where)
        assert group.health()[0].step_id != 99


async def test_garbage_from_a_rank_ends_the_group_in_its_name(leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORGER, GARBAGE)
    group = launch("Echo", 2, bind=LOOPBACK, preload=("support.forger",))
    await group.start()
    with pytest.raises(ProtocolError, match="on the connection of rank 1: a frame has 7 B"):
        await group.step(None)
    await group.aclose(abort=True)


async def test_a_rank_with_a_refused_key_ends_and_says_so(leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Door.rank_keys

    def wrong(door: Door, rank: int) -> RankKeys:
        keys = real(door, rank)
        public, secret = zmq.curve_keypair()
        return RankKeys(public, secret, keys.server) if rank == 1 else keys

    monkeypatch.setattr(Door, "rank_keys", wrong)
    with pytest.raises(WorkerExitedError, match="the driver refused the control connection") as caught:
        async with launch("Echo", 2, bind=LOOPBACK):
            pass
    assert (caught.value.rank, caught.value.exit_code) == (1, 111)


async def test_a_driver_with_another_key_is_not_trusted(leak_check: LeakCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Door.rank_keys

    def wrong(door: Door, rank: int) -> RankKeys:
        keys = real(door, rank)
        return RankKeys(keys.public, keys.secret, zmq.curve_keypair()[0])

    monkeypatch.setattr(Door, "rank_keys", wrong)
    with pytest.raises(ReadyTimeoutError, match="not ready within 3 s"):
        async with launch("Echo", 2, bind=LOOPBACK, deadlines=zspmd.Deadlines(beat_s=0.2, ready_s=3.0)):
            pass


@pytest.mark.parametrize("name", ["step", "result", "control"])
async def test_a_connection_that_breaks_ends_its_rank_by_name(leak_check: LeakCheck, name: str) -> None:
    group = launch("Echo", 2, bind=LOOPBACK)
    await group.start()
    await group.step(None)
    processes = group._processes
    endpoints = {
        "step": processes.publisher.endpoints[0],
        "result": processes.collector.endpoints[0],
        "control": processes._control_endpoints[0],
    }
    _break_one(int(endpoints[name].rpartition(":")[2]))
    with pytest.raises(WorkerExitedError, match=f"the {name} connection to the driver broke") as caught:
        await _step_until(group, time.monotonic() + 20)
    assert caught.value.exit_code == 111
    await group.aclose(abort=True)


async def _step_until(group: zspmd.WorkerGroup, end: float) -> None:
    while time.monotonic() < end:
        await group.step(None)


def _break_one(port: int) -> None:
    """Shut a connection that this process has accepted on a port."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connection) for connection in accepted([port])]
        connections[0].shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("num_peers", "stream_bytes"),
    [(100, ROOM_BYTES), pytest.param(1000, 2 << 30, marks=pytest.mark.long)],
    ids=["a hundred peers", "a thousand peers and 2 GiB"],
)
@pytest.mark.timeout(180)
async def test_idle_peers_garbage_and_a_huge_handshake_cost_little(leak_check: LeakCheck, num_peers: int, stream_bytes: int) -> None:
    before = set(listening([os.getpid()]))
    async with launch("Echo", 2, bind=LOOPBACK) as group:
        ports = [port for _, port in set(listening([os.getpid()])) - before]
        assert len(ports) == 3
        num_own, calm_s, started_with = _num_accepted(ports), await _median_step_s(group), reset_peak()
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(socket.create_connection((LOOPBACK, ports[number % 3]))) for number in range(num_peers)]
            for number, peer in enumerate(peers):
                with contextlib.suppress(OSError):  # the driver has cut it off already
                    peer.sendall((b"", GREETING, os.urandom(512), GREETING[:20])[number % 4])
            crowded_s = await _median_step_s(group)
            with ThreadPoolExecutor(1) as pool:
                sent = await asyncio.get_running_loop().run_in_executor(pool, _stream_handshake, ports[0], stream_bytes)
            flooded_s = await _median_step_s(group)
            growth = peak_bytes() - started_with
        print(
            f"{num_peers} peers: step {calm_s * 1e6:.0f} us, {crowded_s / calm_s:.2f}x among them, {flooded_s / calm_s:.2f}x after; ",
            end="",
        )
        print(f"{growth >> 20} MiB more, {sent >> 20} MiB of a handshake taken")
        assert growth <= ROOM_BYTES
        assert sent < stream_bytes
        await wait_until(lambda: _num_accepted(ports) == num_own)
        assert len(await group.step("unharmed")) == 2


async def _median_step_s(group: zspmd.WorkerGroup) -> float:
    taken = []
    for _ in range(50):
        started = time.monotonic()
        await group.step(None)
        taken.append(time.monotonic() - started)
    return statistics.median(taken)


def _stream_handshake(port: int, stream_bytes: int) -> int:
    """Send a handshake command of that length, as far as the driver takes it."""
    with socket.create_connection((LOOPBACK, port)) as peer, contextlib.suppress(ConnectionError):
        sent = 0
        peer.sendall(GREETING + b"\x06" + struct.pack(">Q", stream_bytes))
        while sent < stream_bytes:
            sent += peer.send(bytes(1 << 18))
    return sent


def _num_accepted(ports: list[int]) -> int:
    with contextlib.ExitStack() as stack:
        return len([stack.enter_context(connection) for connection in accepted(ports)])
