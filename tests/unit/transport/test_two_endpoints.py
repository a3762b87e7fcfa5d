"""The driver's ends at two endpoints at once: within the host, and on TCP behind the door."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import zmq
from support.driver_ends import EPOCH, DriverEnds

from zspmd.errors import BackpressureError, ConfigError
from zspmd.transport.control_sockets import ControlClient
from zspmd.transport.frames import ResultKind, StepFrame, StepKind, frame_view, rank_topic
from zspmd.transport.messages import HIGH_WATER_MARK
from zspmd.transport.records import Accepted, Beat
from zspmd.transport.security import secure_client
from zspmd.transport.sockets import StepPublisher, StepSubscriber

Context = zmq.Context[zmq.Socket[bytes]]
TCP, LOCAL = 0, 1  # indices of the driver's sockets
REMOTE_RANK, LOCAL_RANK = 0, 1
SIZES = (0, 1, 1 << 20, 3)
WAIT_MS = 5000
BEAT = Beat(phase="idle", seq=0, done_seq=0, step_id=-1, memory_bytes=0)


@pytest.fixture
def driver(context: Context) -> Iterator[DriverEnds]:
    made = DriverEnds(context, is_local_too=True)
    yield made
    made.close_door()


class Ranks:
    """A rank on TCP and one within the host, both listening."""

    def __init__(self, driver: DriverEnds) -> None:
        self.gaps: list[tuple[int, int]] = []
        self.ends = {
            rank: driver.subscriber(rank, index=index, on_gap=partial(self._on_gap, rank))
            for rank, index in ((REMOTE_RANK, TCP), (LOCAL_RANK, LOCAL))
        }
        driver.wait_joined(REMOTE_RANK, index=TCP)
        driver.wait_joined(LOCAL_RANK, index=LOCAL)

    def _on_gap(self, rank: int, seq: int) -> None:
        self.gaps.append((rank, seq))

    def receive(self, rank: int) -> StepFrame:
        frame = self.ends[rank].receive(WAIT_MS)
        assert frame is not None
        return frame


@pytest.fixture
def ranks(driver: DriverEnds) -> Ranks:
    return Ranks(driver)


def test_endpoints_are_told_in_the_order_in_which_they_were_asked_for(driver: DriverEnds) -> None:
    for end, name in ((driver.publisher, "step"), (driver.collector, "result"), (driver.server, "control")):
        assert end.endpoints[LOCAL] == f"inproc://{name}"
        assert end.endpoints[TCP].startswith("tcp://127.0.0.1:")
        assert len(end.sockets) == 2


@pytest.mark.parametrize("endpoints", [[], "inproc://step"], ids=["none", "text"])
def test_what_is_no_list_of_endpoints_is_refused(context: Context, endpoints: list[str]) -> None:
    with pytest.raises(ConfigError, match="the endpoints of the step socket are"):
        StepPublisher(context, endpoints, epoch=EPOCH)


def test_one_sequence_of_the_same_frames_goes_both_ways(driver: DriverEnds, ranks: Ranks) -> None:
    buffers = [bytes([index]) * size for index, size in enumerate(SIZES)]
    assert [driver.publisher.publish(StepKind.STEP, b"%d" % number, buffers) for number in range(5)] == list(range(5))
    driver.publisher.tick()
    for rank in (REMOTE_RANK, LOCAL_RANK):
        frames = [ranks.receive(rank) for _ in range(5)]
        assert [(frame.seq, bytes(frame.body)) for frame in frames] == [(number, b"%d" % number) for number in range(5)]
        assert all([bytes(buffer) for buffer in frame.buffers] == buffers for frame in frames)
    assert driver.publisher.sent_bytes == 5 * (17 + sum(SIZES)) + 16  # each frame once


@pytest.mark.parametrize(("rank", "other"), [(REMOTE_RANK, LOCAL), (LOCAL_RANK, TCP)], ids=["remote", "local"])
def test_a_frame_is_sent_again_on_the_socket_of_its_rank_alone(driver: DriverEnds, ranks: Ranks, rank: int, other: int) -> None:
    keys = driver.door.rank_keys(LOCAL_RANK)  # of no use to the socket within the host
    curious = driver.subscriber(LOCAL_RANK, index=other, keys=keys)
    curious.socket.subscribe(b"")
    for _ in range(2):  # what it takes, and its own topic
        driver.subscription(other)
    driver.publisher._places = {REMOTE_RANK: TCP, LOCAL_RANK: LOCAL}
    for number in range(3):
        driver.publisher.publish(StepKind.STEP, b"%d" % number)
    assert driver.publisher.replay(rank, 1) == 2
    assert [ranks.receive(rank).seq for _ in range(3)] == [0, 1, 2]
    assert ranks.ends[rank].receive(0 if rank == LOCAL_RANK else 100) is None
    assert ranks.ends[rank].dropped_duplicates == 2
    assert [curious.receive(WAIT_MS) is not None for _ in range(3)] == [True] * 3
    assert curious.receive(100) is None
    assert curious.dropped_duplicates == 0


def test_a_rank_that_has_not_been_heard_is_looked_for_on_both(driver: DriverEnds, ranks: Ranks) -> None:
    driver.publisher._places.clear()
    driver.publisher.publish(StepKind.STEP)
    for rank in (REMOTE_RANK, LOCAL_RANK):
        driver.publisher.replay(rank, 0)
        driver.publisher.publish(StepKind.STEP)
    for rank, num_later in ((REMOTE_RANK, 2), (LOCAL_RANK, 2)):
        assert [ranks.receive(rank).seq for _ in range(1 + num_later)] == [0, 1, 2]
        assert ranks.ends[rank].receive(100) is None
        assert ranks.ends[rank].dropped_duplicates == 1 + rank


def test_a_frame_that_only_one_socket_has_room_for_reaches_the_others_later(context: Context) -> None:
    publisher = StepPublisher(context, ["inproc://one", "inproc://two"], epoch=EPOCH)
    gaps: list[int] = []
    quick, slow = (
        StepSubscriber(context, endpoint, epoch=EPOCH, rank=rank, on_gap=gaps.append) for rank, endpoint in enumerate(publisher.endpoints)
    )
    for index, rank in enumerate((0, 1)):
        seen = set()
        while (rank, True) not in seen:
            assert publisher.sockets[index].poll(WAIT_MS)
            seen.add(publisher.read_subscription(index))
    num_sent = 3 * HIGH_WATER_MARK
    for number in range(num_sent):  # the pipe of the second holds 2,048
        assert publisher.publish(StepKind.STEP) == number
        frame = quick.receive(WAIT_MS)
        assert frame is not None
        assert frame.seq == number
    got = [slow.receive(WAIT_MS) for _ in range(2 * HIGH_WATER_MARK)]
    assert [frame.seq for frame in got if frame is not None] == list(range(2 * HIGH_WATER_MARK))
    assert slow.receive(0) is None
    publisher.tick()
    assert slow.receive(100) is None
    assert gaps == [2 * HIGH_WATER_MARK]
    assert publisher.replay(1, gaps[0]) == HIGH_WATER_MARK
    rest = [slow.receive(WAIT_MS) for _ in range(HIGH_WATER_MARK)]
    assert [frame.seq for frame in rest if frame is not None] == list(range(2 * HIGH_WATER_MARK, num_sent))


def test_a_first_socket_without_room_has_the_second_send_nothing_either(context: Context) -> None:
    publisher = StepPublisher(context, ["inproc://one", "inproc://two"], epoch=EPOCH)
    ends = [
        StepSubscriber(context, place, epoch=EPOCH, rank=rank, on_gap=lambda seq: None) for rank, place in enumerate(publisher.endpoints)
    ]
    for index in (0, 1):
        for _ in range(2):  # the common topic and its own
            assert publisher.sockets[index].poll(WAIT_MS)
            publisher.read_subscription(index)

    def publish_and_receive() -> None:
        publisher.publish(StepKind.STEP)
        assert ends[1].receive(WAIT_MS) is not None

    with pytest.raises(BackpressureError, match="a rank's pipe holds 1024"):
        list(itertools.islice(iter(publish_and_receive, 0), 4 * HIGH_WATER_MARK))
    assert publisher.next_seq >= HIGH_WATER_MARK
    assert ends[1].receive(0) is None


def test_answers_come_by_both_and_only_those_by_tcp_are_proved(driver: DriverEnds) -> None:
    local, remote = driver.pusher(LOCAL_RANK, index=LOCAL), driver.pusher(REMOTE_RANK)
    local.push(ResultKind.ACK, 1)
    remote.push(ResultKind.ACK, 2)
    heard = [driver.result(LOCAL), driver.result(TCP)]
    assert [(frame.rank, frame.seq) for frame in heard if frame is not None] == [(LOCAL_RANK, 1), (REMOTE_RANK, 2)]
    remote.rank = LOCAL_RANK
    remote.push(ResultKind.ACK, 3)
    assert driver.result(TCP) is None
    assert driver.events == [("impostor", REMOTE_RANK, f"a ACK of frame 3 in the name of rank {LOCAL_RANK}; it was dropped")]


def test_a_rank_on_tcp_does_not_subscribe_for_one_within_the_host(driver: DriverEnds) -> None:
    liar = driver.subscriber(REMOTE_RANK)
    driver.wait_joined(REMOTE_RANK)
    liar.socket.subscribe(rank_topic(LOCAL_RANK))
    assert driver.subscription() is None
    assert driver.publisher._places == {REMOTE_RANK: TCP}
    assert driver.door.impostor_frames == 1
    honest = driver.subscriber(LOCAL_RANK, index=LOCAL)
    driver.wait_joined(LOCAL_RANK, index=LOCAL)
    assert driver.publisher._places == {REMOTE_RANK: TCP, LOCAL_RANK: LOCAL}
    honest.close()


def test_connections_of_the_same_name_are_kept_apart(driver: DriverEnds) -> None:
    clients = []
    for index in (TCP, LOCAL):
        client = ControlClient.__new__(ControlClient)
        client._is_chunked = index == TCP
        client.socket = driver.context.socket(zmq.DEALER)
        client.socket.setsockopt(zmq.ROUTING_ID, b"me")
        if index == TCP:
            keys = driver.door.rank_keys(REMOTE_RANK)
            secure_client(client.socket, driver.server.endpoints[TCP], "control", keys)
        client.socket.connect(driver.server.endpoints[index])
        client.send(BEAT)
        clients.append(client)
    remote, local = driver.record(TCP), driver.record(LOCAL)
    assert (remote.sender, local.sender) == (REMOTE_RANK, None)
    assert remote.connection != local.connection
    driver.server.send(local.connection, Accepted())
    assert clients[LOCAL].receive(WAIT_MS / 1000) == (Accepted(), [])
    assert not clients[TCP].socket.poll(50)
    driver.server.send(remote.connection, BEAT, b"value")
    record, (value,) = clients[TCP].receive(WAIT_MS / 1000)
    assert (record, bytes(frame_view(value))) == (BEAT, b"value")


def test_an_end_that_nothing_has_arrived_at_says_so(driver: DriverEnds) -> None:
    for index in (TCP, LOCAL):
        for receive in (driver.publisher.read_subscription, driver.collector.receive, driver.server.receive):
            with pytest.raises(zmq.Again):
                receive(index)


def test_closing_closes_both(driver: DriverEnds) -> None:
    for end in (driver.publisher, driver.collector, driver.server):
        for _ in range(2):
            end.close()
            assert all(socket.closed for socket in end.sockets)
