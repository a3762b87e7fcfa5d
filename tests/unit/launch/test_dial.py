"""Nodes that call in: who is let in, what is carried, and how each end ends."""

from __future__ import annotations

import asyncio
import os
import secrets
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
from support.polling import wait_until

from zspmd.errors import BadFrameError, ConfigError, EndpointInUseError, LaunchError, PeerLostError
from zspmd.runtime.launch.agent_protocol import RankExited, RankLog, RankStart, Start
from zspmd.runtime.launch.dial.byte_tunnel import CHUNK_BYTES, WINDOW, ByteTunnel
from zspmd.runtime.launch.dial.dial import DialIn, dial_ports
from zspmd.runtime.launch.dial.dial_file import DIRECTORY_NUMBER, DialFile, wait_dial_file
from zspmd.runtime.launch.dial.dial_keys import DialKeys, take_secret
from zspmd.runtime.launch.dial.dial_out import DialOut, describe_self
from zspmd.runtime.launch.dial.dial_records import Call, Taken
from zspmd.runtime.launch.ports import hold_port
from zspmd.runtime.launch.run_directory import RunDirectory
from zspmd.runtime.launch.supervisor import AgentLost, NodeSupervisor

LAUNCH = "dial-test"
KEYS = DialKeys(b"a secret of sixteen", LAUNCH)
DEADLINE_S = 20.0


class Driver:
    """A ``DialIn`` whose callbacks are kept, and the nodes' ends that were made for it."""

    def __init__(self, num_nodes: int) -> None:
        self.signals: list[tuple[int, int]] = []
        self.refused: list[str] = []
        self.dial = DialIn(
            LAUNCH, KEYS, num_nodes=num_nodes, on_signal=lambda *told: self.signals.append(told), on_refused=self.refused.append
        )
        self.dial.open("127.0.0.1", 0)
        self.serving: list[asyncio.Task[int]] = []

    def node(self, rank: int, keys: DialKeys = KEYS, timeout_s: float = DEADLINE_S, **changes: Any) -> asyncio.Task[int]:
        call = replace(describe_self(LAUNCH, rank, len(self.dial.links) + 1), **changes)
        self.out = DialOut(call, keys, "127.0.0.1", [self.dial.port], timeout_s=timeout_s)
        self.serving.append(asyncio.ensure_future(self.out.run()))
        return self.serving[-1]

    async def close(self) -> None:
        self.dial.close()
        for task in self.serving:
            task.cancel()
        await asyncio.gather(*self.serving, return_exceptions=True)


@pytest.fixture
async def two() -> AsyncIterator[Driver]:
    driver = Driver(2)
    yield driver
    await driver.close()


def order(program: str, **fields: Any) -> Start:
    return Start((RankStart(0, dict(os.environ)),), start_method="spawn", argv=(sys.executable, "-I", "-S", "-c", program), **fields)


class Supervised:
    """A supervisor over a node that calls in."""

    def __init__(self, driver: Driver, lease_s: float = 15.0) -> None:
        self.events: list[Any] = []
        self.supervisor = NodeSupervisor(self.events.append, driver.dial.links[1], lease_s)

    async def start(self, program: str, **fields: Any) -> None:
        self.supervisor.open()
        await self.supervisor.wait_attached(DEADLINE_S)
        await self.supervisor.start(order(program, **fields), timeout_s=DEADLINE_S)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


# --- the tunnel ---


class End:
    """One end of a tunnel between two sockets, without a network between."""

    def __init__(self) -> None:
        self.near, far = socket.socketpair()
        self.near.setblocking(False)
        self.sent: list[bytes] = []
        self.told: list[str] = []
        self.tunnel = ByteTunnel(
            far,
            send=self.sent.append,
            grant=lambda: self.told.append("grant"),
            on_read_end=lambda: self.told.append("read end"),
            on_written_out=lambda: self.told.append("written out"),
        )
        self.tunnel.open()


@pytest.fixture
async def end() -> AsyncIterator[End]:
    made = End()
    yield made
    made.tunnel.close()
    made.near.close()


async def test_a_tunnel_stops_reading_at_its_window(end: End) -> None:
    loop = asyncio.get_running_loop()
    writing = asyncio.ensure_future(loop.sock_sendall(end.near, bytes(4 * WINDOW * CHUNK_BYTES)))
    await wait_until(lambda: len(end.sent) >= WINDOW and not select.select([], [end.near], [], 0)[1])
    assert len(end.sent) == WINDOW
    end.tunnel.granted()
    await wait_until(lambda: len(end.sent) == WINDOW + 1)
    writing.cancel()
    await asyncio.gather(writing, return_exceptions=True)


async def test_a_tunnel_grants_what_is_read_and_refuses_more_than_its_window(end: End) -> None:
    chunk = bytes(CHUNK_BYTES)
    num_sent = 0
    while num_sent - end.told.count("grant") < WINDOW:
        end.tunnel.receive(chunk)
        num_sent += 1
    with pytest.raises(BadFrameError, match=f"beside {WINDOW} chunks"):
        end.tunnel.receive(chunk)
    assert num_sent - end.told.count("grant") == WINDOW
    size = 0
    loop = asyncio.get_running_loop()
    while size < num_sent * CHUNK_BYTES:
        size += len(await asyncio.wait_for(loop.sock_recv(end.near, 1 << 20), DEADLINE_S))
    await wait_until(lambda: end.told.count("grant") == num_sent)
    with pytest.raises(BadFrameError, match="the limits are"):
        end.tunnel.receive(bytes(CHUNK_BYTES + 1))


async def test_a_tunnel_finishes_behind_the_last_byte(end: End) -> None:
    end.tunnel.receive(b"last")
    end.tunnel.finish()
    loop = asyncio.get_running_loop()
    assert await loop.sock_recv(end.near, 10) == b"last"
    assert await loop.sock_recv(end.near, 10) == b""
    assert end.told == ["grant", "written out"]
    await loop.sock_sendall(end.near, b"still")
    await wait_until(lambda: end.sent == [b"still"])
    end.near.shutdown(socket.SHUT_WR)
    await wait_until(lambda: end.told[-1] == "read end")


async def test_a_tunnel_drops_what_nobody_reads(end: End) -> None:
    end.near.close()
    end.tunnel.receive(b"for nobody")
    end.tunnel.finish()
    await wait_until(lambda: "read end" in end.told)
    assert end.told.count("grant") == 1
    assert "written out" in end.told


# --- calls ---


async def test_an_agent_of_a_node_that_called_in_runs_ranks(two: Driver) -> None:
    serving = two.node(1)
    calls = await two.dial.wait_called(DEADLINE_S)
    assert (calls[1].host, calls[1].pid, calls[1].num_slots) == (socket.gethostname(), os.getpid(), 1)
    assert two.dial.links[1].address == "127.0.0.1"
    node = Supervised(two)
    await node.start("print('here')")
    await wait_until(lambda: node.of(RankExited), DEADLINE_S)
    assert [log.lines for log in node.of(RankLog)] == [("here",)]
    assert (
        await two.dial.links[1].wait_ended(DEADLINE_S)
        == f"node 1, pid {os.getpid()} on {socket.gethostname()}: its agent exited with code 0"
    )
    await node.supervisor.stop(0.0, 1.0)
    await two.dial.aclose(7)
    assert await serving == 7


async def test_a_link_may_be_opened_before_its_node_calls_and_again_after_its_agent(two: Driver) -> None:
    for number in range(2):
        node = Supervised(two)
        node.supervisor.open()
        if number == 0:
            assert two.dial.links[1].name == "node 1, which has not called in"
            two.node(1)
        await node.supervisor.wait_attached(DEADLINE_S)
        await node.supervisor.start(order("raise SystemExit(4)"), timeout_s=DEADLINE_S)
        await wait_until(lambda node=node: node.of(RankExited), DEADLINE_S)  # type: ignore[misc]
        assert await node.supervisor.stop(0.0, 1.0) == {0: 4}
    await two.close()


async def test_much_output_comes_whole_through_the_window(two: Driver) -> None:
    two.node(1)
    node = Supervised(two)
    await node.start(f"import sys\nfor i in range(4000): print(str(i).zfill({2 * WINDOW * CHUNK_BYTES // 2000}))", log_policy="wait")
    await wait_until(lambda: node.of(RankExited), DEADLINE_S)
    lines = [line for log in node.of(RankLog) for line in log.lines]
    assert [int(line) for line in lines] == list(range(4000))
    await node.supervisor.stop(0.0, 1.0)
    await two.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "0.0.9"}, "it runs zspmd 0.0.9, the driver .*; install the same version everywhere"),
        ({"launch_id": "other"}, "it belongs to launch other, and this is dial-test"),
        ({"num_nodes": 3}, "it was told of 3 nodes, the driver of 2"),
        ({"node_rank": 0}, "nodes that call in have the numbers 1 to 1"),
        ({"node_rank": 2}, "nodes that call in have the numbers 1 to 1"),
    ],
    ids=["version", "launch", "number of nodes", "the driver's own", "beyond the last"],
)
async def test_a_call_that_does_not_fit_is_refused(two: Driver, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=f"the driver has refused node {changes.get('node_rank', 1)}, pid {os.getpid()} on .*: {message}"):
        await two.node(1, **changes)
    assert len(two.refused) == 1


async def test_a_node_that_calls_twice_is_refused_and_the_first_goes_on(two: Driver) -> None:
    first = two.node(1)
    await two.dial.wait_called(DEADLINE_S)
    with pytest.raises(LaunchError, match="a node 1 has called already, pid"):
        await two.node(1)
    await two.dial.aclose(0)
    assert await first == 0


async def test_another_secret_is_not_let_in(two: Driver) -> None:
    with pytest.raises(LaunchError, match=r"no driver of launch dial-test with this secret answered within 1 s at tcp://127.0.0.1:\d+"):
        await two.node(1, DialKeys(b"another secret of sixteen", LAUNCH), timeout_s=1.0)
    with pytest.raises(LaunchError, match=r"node 1 has not called in at 127.0.0.1:\d+ within 0.1 s; start the same command there"):
        await two.dial.wait_called(0.1)


async def test_a_key_of_the_client_s_own_is_not_let_in(two: Driver) -> None:
    """Who knows the driver's public key alone, from anywhere, gets no further than the handshake."""
    keys = DialKeys(b"a secret of sixteen", LAUNCH)
    public, secret = zmq.curve_keypair()
    keys.node = replace(keys.node, public=public, secret=secret)
    with pytest.raises(LaunchError, match="no driver of launch"):
        await two.node(1, keys, timeout_s=1.0)
    assert "its key is none of this launch" in two.refused[0]


async def test_a_first_record_that_is_no_call_is_refused(two: Driver) -> None:
    serving = two.node(1)
    two.out._call = Taken()  # type: ignore[assignment]  # what no node does
    with pytest.raises(LaunchError, match="the driver has refused its first record is a Taken"):
        await serving


# --- ends ---


async def test_a_signal_is_told_and_a_second_ends_the_node(two: Driver) -> None:
    serving = two.node(1)
    await two.dial.wait_called(DEADLINE_S)
    two.out.signal(signal.SIGTERM)
    await wait_until(lambda: two.signals == [(1, signal.SIGTERM)])
    assert not serving.done()
    two.out.signal(signal.SIGINT)
    assert await serving == 130


async def test_a_lost_driver_ends_the_agent_and_its_ranks(two: Driver) -> None:
    serving = two.node(1)
    node = Supervised(two)
    await node.start("import signal; signal.pause()")
    (pid,) = node.supervisor.pids.values()
    pidfd = os.pidfd_open(pid)
    two.dial.close()
    with pytest.raises(PeerLostError, match=r"the connection to the driver at .* was lost"):
        await asyncio.wait_for(serving, DEADLINE_S)
    assert os.stat(pidfd)
    os.close(pidfd)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    await node.supervisor.stop(0.0, 0.0)


async def test_a_lost_node_is_named_at_once(two: Driver) -> None:
    serving = two.node(1)
    node = Supervised(two)
    await node.start("import signal; signal.pause()")
    loop = asyncio.get_running_loop()
    started = loop.time()
    serving.cancel()  # its agent ends first, then its connection
    await wait_until(lambda: node.of(AgentLost), DEADLINE_S)
    assert loop.time() - started < 5.0
    (lost,) = node.of(AgentLost)
    assert lost.reason.startswith(f"node 1, pid {os.getpid()} on ")
    assert lost.ranks == (0,)
    await node.supervisor.stop(0.0, 0.0)
    with pytest.raises(LaunchError, match="is gone"):
        two.dial.links[1].open()


async def test_a_link_that_is_killed_lets_its_node_end_its_agent(two: Driver) -> None:
    serving = two.node(1)
    node = Supervised(two)
    await node.start("import signal; signal.pause()")
    (pid,) = node.supervisor.pids.values()
    two.dial.links[1].kill()
    assert await two.dial.links[1].wait_ended(1.0) is not None
    await wait_until(lambda: not os.path.exists(f"/proc/{pid}"), DEADLINE_S)
    await two.dial.aclose(121)
    assert await serving == 121
    await node.supervisor.stop(0.0, 0.0)


async def test_a_node_that_is_lost_while_others_are_awaited_is_named() -> None:
    driver = Driver(3)
    first = driver.node(1)
    await wait_until(lambda: driver.dial.links[1].call is not None)
    first.cancel()
    with pytest.raises(LaunchError, match=r"node 1, pid \d+ on .*: its connection was lost"):
        await driver.dial.wait_called(DEADLINE_S)
    await driver.close()


# --- ports ---


async def test_nodes_find_the_driver_at_a_later_candidate() -> None:
    launch_id = f"dial-{secrets.token_hex(8)}"  # its ports were not in use a moment ago
    foreign, keys = DialKeys(b"somebody else's secret", launch_id), DialKeys(b"a secret of sixteen", launch_id)
    first, second = (DialIn(launch_id, used, num_nodes=2, on_signal=lambda *_: None, on_refused=lambda _: None) for used in (foreign, keys))
    try:
        first.open("127.0.0.1")
        second.open("127.0.0.1")
        assert first.port in dial_ports(launch_id)
        assert second.port in dial_ports(launch_id)[1:]
        out = DialOut(describe_self(launch_id, 1, 2), keys, "127.0.0.1", dial_ports(launch_id), timeout_s=DEADLINE_S)
        serving = asyncio.ensure_future(out.run())
        await second.wait_called(DEADLINE_S)
        assert first.links[1].call is None
        await second.aclose(0)
        assert await serving == 0
    finally:
        first.close()
        second.close()


async def test_a_port_that_is_taken_is_told() -> None:
    dial = DialIn(LAUNCH, KEYS, num_nodes=2, on_signal=lambda *_: None, on_refused=lambda _: None)
    with hold_port("127.0.0.1", dial_ports("taken")[0]) as held, pytest.raises(EndpointInUseError, match=f"port {held.port} of 127.0.0.1"):
        dial.open("127.0.0.1", held.port)
    dial.close()


# --- secrets ---


def test_keys_follow_from_secret_and_launch_alone() -> None:
    same = DialKeys(b"a secret of sixteen", LAUNCH)
    assert (same.server_secret, same.node) == (KEYS.server_secret, KEYS.node)
    others = [DialKeys(b"a secret of sixteen", "other"), DialKeys(b"a secret of Sixteen", LAUNCH)]
    assert len({keys.server_secret for keys in (KEYS, *others)} | {keys.node.secret for keys in (KEYS, *others)}) == 6
    assert KEYS.node.secret.decode() not in repr(KEYS.node)


def test_the_secret_leaves_the_environment_and_a_file_wins(tmp_path: Path) -> None:
    environment = {"ZSPMD_SECRET": "in the environment"}
    file = tmp_path / "secret"
    file.write_text("in a private file\n")
    file.chmod(0o600)
    assert take_secret(dict(environment), str(file)) == b"in a private file"
    assert take_secret(environment, None) == b"in the environment"
    assert environment == {}
    assert take_secret(environment, None) is None


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("too short", 0o600, "has 9 characters; it needs at least 16: make one with: openssl rand -hex 32"),
        ("long enough for a secret", 0o640, "which has mode 0640; run: chmod 600"),
        ("long enough for a secret", 0o604, "which has mode 0604"),
        ("x" * 5000, 0o600, "is no file of at most 4096 bytes"),
    ],
    ids=["short", "group", "world", "large"],
)
def test_a_file_that_is_no_private_secret_is_refused(tmp_path: Path, content: str, mode: int, message: str) -> None:
    file = tmp_path / "secret"
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=message):
        take_secret({}, str(file))
    with pytest.raises(ConfigError, match=r"cannot be read from .*: No such file"):
        take_secret({}, str(tmp_path / "none"))


async def test_the_file_of_a_driver_that_lives_is_found_and_no_other() -> None:
    directory = RunDirectory.create(LAUNCH, DIRECTORY_NUMBER)
    try:
        file = DialFile.create("127.0.0.1", 1234, "secret")
        replace(file, started="1").write(directory.path)
        with pytest.raises(LaunchError, match=r"the driver of launch dial-test did not listen within 0.05 s"):
            await wait_dial_file(LAUNCH, 0.05)
        file.write(directory.path)
        assert await wait_dial_file(LAUNCH, 1.0) == file
        (directory.path / "dial").chmod(0o644)
        with pytest.raises(LaunchError, match="did not listen"):
            await wait_dial_file(LAUNCH, 0.05)
    finally:
        directory.remove()


def test_a_call_says_nothing_secret() -> None:
    assert set(Call.__dataclass_fields__) == {
        "version",
        "launch_id",
        "node_rank",
        "num_nodes",
        "host",
        "pid",
        "num_slots",
        "local_rank",
        "local_world_size",
        "devices",
    }
