"""The door over real TCP on the loopback interface: who gets in, as whom, and what becomes of those who lie."""

from __future__ import annotations

import socket as sockets
import struct
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import zmq
from support.driver_ends import DriverEnds
from support.polling import block_until

from zspmd.errors import BadFrameError
from zspmd.transport.chunks import CHUNK_BYTES
from zspmd.transport.control_sockets import ControlClient
from zspmd.transport.door import Door
from zspmd.transport.frames import ResultKind, StepKind, rank_topic
from zspmd.transport.records import Beat
from zspmd.transport.security import MAX_PART_BYTES, RankKeys
from zspmd.transport.sockets import StepSubscriber

Context = zmq.Context[zmq.Socket[bytes]]
BEAT = Beat(phase="idle", seq=0, done_seq=0, step_id=-1, memory_bytes=0)
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
LARGE = (0, 1, CHUNK_BYTES - 48, CHUNK_BYTES, 5 * CHUNK_BYTES + 3)


@pytest.fixture
def driver(context: Context) -> Iterator[DriverEnds]:
    made = DriverEnds(context, 3, {1: (1, 2)})
    yield made
    made.close_door()


def monitored(socket: zmq.Socket[Any], number: int = 0) -> zmq.Socket[Any]:
    return socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH, f"inproc://monitor-{number}")


def test_messages_go_all_ways_and_their_sender_is_known(driver: DriverEnds) -> None:
    driver.pusher(1).push(ResultKind.OUTPUT, 3, b"body", [b"x" * length for length in LARGE])
    frame = driver.result()
    assert frame is not None
    assert (frame.rank, frame.seq, bytes(frame.body), [len(buffer) for buffer in frame.buffers]) == (1, 3, b"body", list(LARGE))
    subscriber = driver.subscriber(0)
    block_until(lambda: driver.subscription() == (0, True))
    driver.publisher.publish(StepKind.STEP, b"head", [b"y" * length for length in LARGE])
    step = subscriber.receive(5000)
    assert step is not None
    assert (bytes(step.body), [bytes(buffer) for buffer in step.buffers]) == (b"head", [b"y" * length for length in LARGE])
    client = driver.client(1)
    client.send(BEAT)
    received = driver.record()
    assert (received.record, received.sender) == (BEAT, 1)
    driver.server.send(received.connection, BEAT, b"v" * CHUNK_BYTES, [b"w"])
    record, frames = client.receive(5)
    assert (record, [len(frame) for frame in frames]) == (BEAT, [CHUNK_BYTES, 1])
    assert (driver.door.refused, driver.door.impostor_frames, driver.events) == (0, 0, [])


def test_an_answer_in_the_name_of_another_is_dropped_and_counted(driver: DriverEnds) -> None:
    pusher = driver.pusher(1)
    pusher.rank = 0
    pusher.push(ResultKind.ACK, 4)
    assert driver.result() is None
    pusher.rank = 1
    pusher.push(ResultKind.ACK, 5)
    frame = driver.result()
    assert frame is not None
    assert (frame.rank, frame.seq) == (1, 5)
    assert driver.door.impostor_frames == 1
    assert driver.events == [("impostor", 1, "a ACK of frame 4 in the name of rank 0; it was dropped")]


def test_a_subscription_in_the_name_of_another_does_not_hide_the_others_own(driver: DriverEnds) -> None:
    liar = driver.subscriber(1)
    liar.socket.subscribe(rank_topic(0))
    joined = []
    for _ in range(3):  # the common topic, its own, and the other's
        joined.append(driver.subscription())
    assert joined.count((1, True)) == joined.count(None) - 1 == 1
    assert driver.events == [("impostor", 1, "a subscription in the name of rank 0; it was dropped")]
    honest = driver.subscriber(0)
    block_until(lambda: driver.subscription() == (0, True))
    honest.close()


def test_a_malformed_answer_names_the_rank_of_its_connection(driver: DriverEnds) -> None:
    driver.pusher(1).socket.send(b"rubbish")
    with pytest.raises(BadFrameError, match="on the connection of rank 1: a frame has 7 B"):
        driver.result()
    driver.client(0).socket.send(b"rubbish")
    with pytest.raises(BadFrameError, match="on a control connection of rank 0: a record is"):
        driver.record()


def stranger(driver: DriverEnds) -> zmq.Socket[bytes]:
    public, secret = zmq.curve_keypair()
    return driver.pusher(0, RankKeys(public, secret, driver.door.rank_keys(0).server)).socket


def of_another_launch(driver: DriverEnds) -> zmq.Socket[bytes]:
    with zmq.Context() as context:
        other = Door(context, 2, lambda *event: None)
        other.close()
        return driver.pusher(0, other.rank_keys(0)).socket


def without_curve(driver: DriverEnds) -> zmq.Socket[bytes]:
    socket = driver.context.socket(zmq.PUSH)
    socket.connect(driver.collector.endpoints[0])
    return socket


@pytest.mark.parametrize("peer", [stranger, of_another_launch, without_curve], ids=lambda peer: peer.__name__)
def test_nothing_arrives_of_peers_without_a_key_of_the_launch(driver: DriverEnds, peer: Callable[[DriverEnds], zmq.Socket[bytes]]) -> None:
    events = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    monitor = driver.collector.sockets[0].get_monitor_socket(events, "inproc://failed")
    socket = peer(driver)
    socket.send(b"rubbish")
    block_until(lambda: monitor.poll(0))
    driver.pusher(1).push(ResultKind.ACK, 9)  # a neighbour is served meanwhile
    frame = driver.result()
    assert frame is not None
    assert frame.seq == 9
    assert not driver.collector.sockets[0].poll(50)
    assert driver.door.refused == len(driver.events) == (peer is stranger)


def test_a_connection_that_was_lost_is_not_taken_up_again(driver: DriverEnds) -> None:
    first = driver.pusher(1)
    first.push(ResultKind.ACK, 0)
    assert driver.result() is not None
    first.close()
    again = driver.pusher(1)
    monitor = monitored(again.socket)
    again.push(ResultKind.ACK, 1)
    block_until(lambda: monitor.poll(0))
    assert driver.events == [
        (
            "refused",
            1,
            "a connection from 127.0.0.1 to the result socket: rank 1 has had its connection; one that was lost is not taken up again",
        )
    ]
    assert not driver.collector.sockets[0].poll(50)


def test_a_rank_may_have_any_number_of_control_connections(driver: DriverEnds) -> None:
    for _ in range(3):
        client = driver.client(1)
        client.send(BEAT)
        assert driver.record().sender == 1


def test_nobody_gets_in_while_nobody_answers_the_door(driver: DriverEnds) -> None:
    driver.close_door()
    pusher = driver.pusher(1)
    monitor = monitored(pusher.socket)
    pusher.push(ResultKind.ACK, 0)
    assert not driver.collector.sockets[0].poll(500)
    assert not monitor.poll(0)


def raw(endpoint: str) -> sockets.socket:
    return sockets.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])))


def closes(peer: sockets.socket) -> bool:
    """Whether the driver's side has closed the connection."""
    peer.settimeout(0.05)
    try:
        while peer.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        return True
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"\0" * 4096,
        GREETING[:11],
        GREETING,
        GREETING.replace(b"CURVE", b"NULL\0"),
        GREETING + b"\x04\xff" + b"x" * 255,
    ],
    ids=["http", "zeros", "half a greeting", "a greeting", "NULL", "a wrong command"],
)
def test_garbage_is_cut_off_and_nothing_of_it_arrives(driver: DriverEnds, sent: bytes) -> None:
    with raw(driver.collector.endpoints[0]) as peer:
        peer.sendall(sent)
        block_until(partial(closes, peer))
    assert not driver.collector.sockets[0].poll(0)


def test_a_handshake_above_the_limit_is_cut_off(driver: DriverEnds) -> None:
    with raw(driver.collector.endpoints[0]) as peer:
        peer.sendall(GREETING + b"\x06" + struct.pack(">Q", 2 << 30))
        with pytest.raises(ConnectionError):
            peer.sendall(bytes(64 << 20))


def test_a_part_above_the_limit_ends_its_connection(driver: DriverEnds) -> None:
    pusher = driver.pusher(1)
    monitor = pusher.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED, "inproc://gone")
    pusher.socket.send(bytes(MAX_PART_BYTES + 1))
    block_until(lambda: monitor.poll(0))
    assert not driver.collector.sockets[0].poll(50)


def relayed(driver: DriverEnds, rank: int) -> StepSubscriber:
    """Subscribe for a rank by the key of node 1's relay, as that does for its ranks."""
    return driver.subscriber(rank, keys=driver.door.node_keys(1))


def test_a_relay_subscribes_for_the_ranks_of_its_node_and_no_other(driver: DriverEnds) -> None:
    relay = relayed(driver, 1)
    driver.wait_joined(1)
    relay.socket.subscribe(rank_topic(0))
    assert driver.subscription() is None
    relay.socket.subscribe(rank_topic(2))
    assert driver.subscription() == (2, True)
    told = "a subscription by the relay of node 1 in the name of rank 0; it was dropped"
    assert (driver.events, driver.door.impostor_frames) == ([("impostor", None, told)], 1)
    honest = driver.subscriber(0)
    driver.wait_joined(0)
    honest.close()


def test_a_rank_of_a_relayed_node_still_proves_itself(driver: DriverEnds) -> None:
    own = driver.subscriber(1)
    driver.wait_joined(1)
    own.socket.subscribe(rank_topic(2))
    assert driver.subscription() is None
    assert driver.events == [("impostor", 1, "a subscription in the name of rank 2; it was dropped")]


def push_by_relay(driver: DriverEnds) -> zmq.Socket[bytes]:
    return driver.pusher(1, driver.door.node_keys(1)).socket


def control_by_relay(driver: DriverEnds) -> zmq.Socket[bytes]:
    return ControlClient(driver.context, driver.server.endpoints[0], driver.door.node_keys(1)).socket


@pytest.mark.parametrize(("connect", "name"), [(push_by_relay, "result"), (control_by_relay, "control")], ids=["result", "control"])
def test_a_relay_is_let_in_for_steps_alone(driver: DriverEnds, connect: Callable[[DriverEnds], zmq.Socket[bytes]], name: str) -> None:
    socket = connect(driver)
    monitor = monitored(socket)
    socket.send(b"rubbish")
    block_until(lambda: monitor.poll(0))
    told = f"a connection from 127.0.0.1 to the {name} socket: the relay of node 1 takes steps and has no other connection"
    assert driver.events == [("refused", None, told)]
    assert driver.door.refused == 1
    for silent in (driver.collector.sockets[0], driver.server.sockets[0]):
        assert not silent.poll(50)


def test_a_relay_has_one_connection(driver: DriverEnds) -> None:
    first = relayed(driver, 1)
    driver.wait_joined(1)
    first.close()
    again = relayed(driver, 2)
    monitor = monitored(again.socket)
    block_until(lambda: monitor.poll(0))
    ((kind, rank, why),) = driver.events
    assert (kind, rank) == ("refused", None)
    assert why.endswith("the relay of node 1 has had its connection; one that was lost is not taken up again")


def test_a_node_without_a_relay_has_no_key(driver: DriverEnds) -> None:
    with pytest.raises(KeyError):
        driver.door.node_keys(0)
