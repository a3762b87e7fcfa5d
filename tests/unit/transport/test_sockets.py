"""The socket ends over inproc: the handshake, what is dropped, what is an error, and large buffers."""

from __future__ import annotations

import itertools
import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
import zmq

from zspmd.errors import BackpressureError, BadFrameError, LaunchError, StepGapError, WireVersionError
from zspmd.transport.codec import ValueEncoder, decode_value
from zspmd.transport.control_sockets import ControlServer
from zspmd.transport.frames import STEP_TOPIC, ResultKind, StepFrame, StepKind, pack_result_header, pack_step_header
from zspmd.transport.messages import COPY_BELOW_BYTES, HIGH_WATER_MARK
from zspmd.transport.sockets import (
    ResultCollector,
    ResultPusher,
    StepPublisher,
    StepSubscriber,
)

Context = zmq.Context[zmq.Socket[bytes]]
EPOCH = 7
WAIT_MS = 5000


class StepPair:
    """A publisher and the subscribers of some ranks, once their subscriptions have arrived."""

    def __init__(self, context: Context, num_ranks: int) -> None:
        self.publisher = StepPublisher(context, ["inproc://step"], epoch=EPOCH)
        self.gaps: list[tuple[int, int]] = []  # (rank, frame) in the order of asking
        self.subscribers = [
            StepSubscriber(context, "inproc://step", epoch=EPOCH, rank=rank, on_gap=partial(self.on_gap, rank)) for rank in range(num_ranks)
        ]
        self.joined: list[int] = []
        while len(self.joined) < num_ranks:
            assert self.publisher.sockets[0].poll(WAIT_MS)
            change = self.publisher.read_subscription()
            if change is not None:
                assert change[1]
                self.joined.append(change[0])

    def on_gap(self, rank: int, seq: int) -> None:
        self.gaps.append((rank, seq))

    def receive(self, rank: int = 0) -> StepFrame:
        frame = self.subscribers[rank].receive(WAIT_MS)
        assert frame is not None
        return frame

    def inject(self, epoch: int, seq: int) -> None:
        """Publish an empty step with numbers of the test's choice."""
        self.publisher.sockets[0].send(pack_step_header(StepKind.STEP, epoch, seq))


@pytest.fixture
def pair(context: Context) -> StepPair:
    return StepPair(context, 1)


@pytest.fixture
def results(context: Context) -> tuple[ResultCollector, ResultPusher]:
    return ResultCollector(context, ["inproc://result"], epoch=EPOCH), ResultPusher(context, "inproc://result", epoch=EPOCH, rank=3)


def test_a_handshake_then_every_frame_in_order(context: Context) -> None:
    pair = StepPair(context, 3)
    assert sorted(pair.joined) == [0, 1, 2]
    collector = ResultCollector(context, ["inproc://result"], epoch=EPOCH)
    pushers = [ResultPusher(context, "inproc://result", epoch=EPOCH, rank=rank) for rank in range(3)]
    assert pair.publisher.publish(StepKind.SYNC) == 0
    for rank, pusher in enumerate(pushers):
        assert pair.receive(rank).kind is StepKind.SYNC
        pusher.push(ResultKind.SYNC_ACK, 0)
    ready = set()
    for _ in pushers:
        assert collector.sockets[0].poll(WAIT_MS)
        frame = collector.receive()
        assert frame is not None
        ready.add((frame.kind, frame.rank, frame.seq))
    assert ready == {(ResultKind.SYNC_ACK, rank, 0) for rank in range(3)}
    for seq in range(1, 50):
        assert pair.publisher.publish(StepKind.STEP, b"%d" % seq) == seq
    for rank in range(3):
        assert [bytes(pair.receive(rank).body) for _ in range(49)] == [b"%d" % seq for seq in range(1, 50)]


def test_a_rank_that_leaves_is_seen(pair: StepPair) -> None:
    pair.subscribers[0].close()
    changes: list[tuple[int, bool] | None] = []
    while len(changes) < 2:
        assert pair.publisher.sockets[0].poll(WAIT_MS)
        changes.append(pair.publisher.read_subscription())
    assert set(changes) == {(0, False), None}  # its own topic, and the common one


def test_nothing_within_the_timeout_is_none(pair: StepPair) -> None:
    assert pair.subscribers[0].receive(0) is None
    assert pair.subscribers[0].receive(1) is None


def test_a_foreign_frame_is_dropped_and_counted(pair: StepPair) -> None:
    pair.inject(EPOCH + 1, 0)
    pair.inject(EPOCH - 1, 9)
    pair.publisher.publish(StepKind.STEP, b"ours")
    assert bytes(pair.receive().body) == b"ours"
    assert (pair.subscribers[0].dropped_foreign, pair.subscribers[0].dropped_duplicates) == (2, 0)


def test_a_duplicate_is_dropped_and_counted(pair: StepPair) -> None:
    for seq in (0, 0, 1, 0, 1, 2):
        pair.inject(EPOCH, seq)
    assert [pair.receive().seq for _ in range(3)] == [0, 1, 2]
    assert (pair.subscribers[0].dropped_foreign, pair.subscribers[0].dropped_duplicates) == (0, 3)


def test_a_missing_frame_is_asked_for_once_and_what_follows_is_held(pair: StepPair) -> None:
    subscriber = pair.subscribers[0]
    for seq in (0, 2, 3, 2):
        pair.inject(EPOCH, seq)
    assert pair.receive().seq == 0
    assert subscriber.receive(0) is None
    assert pair.gaps == [(0, 1)]
    for seq in (1, 2, 3, 4):
        pair.inject(EPOCH, seq)
    assert [pair.receive().seq for _ in range(4)] == [1, 2, 3, 4]
    assert (subscriber.gaps, subscriber.dropped_duplicates, len(pair.gaps)) == (1, 3, 1)


def test_what_is_lost_from_a_replay_is_asked_for_by_what_follows_it(pair: StepPair) -> None:
    for seq in (0, 3, 4):
        pair.inject(EPOCH, seq)
    assert pair.receive().seq == 0
    assert pair.subscribers[0].receive(0) is None
    for seq in (1, 3):  # of the frames sent again, 2 is lost
        pair.inject(EPOCH, seq)
    assert pair.receive().seq == 1
    assert pair.subscribers[0].receive(0) is None
    assert pair.gaps == [(0, 1), (0, 2)]
    pair.inject(EPOCH, 2)
    assert [pair.receive().seq for _ in range(3)] == [2, 3, 4]


def test_a_replay_reaches_one_rank_alone_and_is_the_same_bytes(context: Context) -> None:
    pair = StepPair(context, 2)
    large = bytes(range(256)) * 2048
    for seq, buffers in enumerate([[], [large], []]):
        assert pair.publisher.publish(StepKind.STEP, b"body %d" % seq, buffers) == seq
    first = [pair.receive(0) for _ in range(3)]
    assert [pair.receive(1).seq for _ in range(3)] == [0, 1, 2]
    pair.subscribers[0].next_seq = 1  # as if the rest had been lost
    assert pair.publisher.replay(0, 1) == pair.publisher.replayed == 2
    again = [pair.receive(0) for _ in range(2)]
    for before, after in zip(first[1:], again):
        assert (before.kind, before.epoch, before.seq, bytes(before.body)) == (after.kind, after.epoch, after.seq, bytes(after.body))
        assert [bytes(buffer) for buffer in before.buffers] == [bytes(buffer) for buffer in after.buffers]
    assert pair.subscribers[1].receive(0) is None


def test_a_tick_tells_of_a_lost_end_and_nothing_else(pair: StepPair) -> None:
    pair.publisher.publish(StepKind.STEP)
    pair.publisher.tick()
    assert pair.receive().seq == 0
    assert pair.subscribers[0].receive(0) is None
    assert pair.gaps == []
    pair.publisher.next_seq = 3  # frames 1 and 2 are lost
    pair.publisher.tick()
    pair.publisher.tick()
    assert pair.subscribers[0].receive(0) is None
    assert pair.gaps == [(0, 1), (0, 1)]  # the answer to the first may have been lost too
    assert pair.subscribers[0].gaps == 1


def test_forgotten_frames_cannot_be_sent_again(pair: StepPair) -> None:
    for _ in range(4):
        pair.publisher.publish(StepKind.STEP)
    pair.publisher.forget(2)
    assert pair.publisher.replay(0, 2) == 2
    for seq in (1, 4):
        with pytest.raises(StepGapError, match=f"rank 0: expected frame {seq}, got 2"):
            pair.publisher.replay(0, seq)


def test_more_frames_beyond_a_gap_than_can_be_in_flight_are_an_error_that_says_where(pair: StepPair) -> None:
    for seq in range(1, HIGH_WATER_MARK + 1):
        pair.inject(EPOCH, seq)
        assert pair.subscribers[0].receive(0) is None
    pair.inject(EPOCH, HIGH_WATER_MARK + 1)
    with pytest.raises(StepGapError, match="rank 0: expected frame 0, got 1025") as caught:
        pair.subscribers[0].receive(WAIT_MS)
    assert (caught.value.expected, caught.value.got, caught.value.rank) == (0, HIGH_WATER_MARK + 1, 0)


@pytest.mark.parametrize(
    ("frame", "error"),
    [(STEP_TOPIC, BadFrameError), (b"SX" + bytes(14), BadFrameError), (b"SZ\x09" + bytes(13), WireVersionError)],
    ids=["short", "wrong magic", "wrong version"],
)
def test_a_malformed_frame_is_an_error(pair: StepPair, frame: bytes, error: type[Exception]) -> None:
    pair.publisher.sockets[0].send(frame)
    with pytest.raises(error):
        pair.subscribers[0].receive(WAIT_MS)


def test_a_full_pipe_is_backpressure_and_loses_nothing(pair: StepPair) -> None:
    fill = itertools.islice(iter(lambda: pair.publisher.publish(StepKind.STEP), None), 4 * HIGH_WATER_MARK)
    with pytest.raises(BackpressureError, match="a rank's pipe holds 1024 unread messages"):
        list(fill)
    num_sent = pair.publisher.next_seq
    assert num_sent >= HIGH_WATER_MARK
    assert [pair.receive().seq for _ in range(num_sent)] == list(range(num_sent))
    assert pair.subscribers[0].receive(0) is None
    assert pair.publisher.publish(StepKind.STEP) == num_sent


def test_a_full_pipe_of_one_rank_sends_to_no_other(context: Context) -> None:
    pair = StepPair(context, 2)

    def publish_and_receive() -> int:
        seq = pair.publisher.publish(StepKind.STEP, b"x", [b"y"])
        assert pair.receive(0).seq == seq
        return seq

    steps = itertools.islice(iter(publish_and_receive, None), 4 * HIGH_WATER_MARK)  # rank 1 reads none of them
    with pytest.raises(BackpressureError):
        list(steps)
    assert pair.subscribers[0].receive(0) is None


@pytest.mark.parametrize("size", [0, COPY_BELOW_BYTES - 1, COPY_BELOW_BYTES, 16 << 20], ids=["empty", "copied", "tracked", "16 MiB"])
def test_buffers_arrive_as_they_were(pair: StepPair, results: tuple[ResultCollector, ResultPusher], size: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    value = {"x": array, "y": [array[: size // 2], array[::3]]}
    body, buffers = ValueEncoder().encode(value)
    pair.publisher.publish(StepKind.STEP, body, buffers)
    assert pair.publisher.sent_bytes == 16 + len(body) + sum(map(len, buffers))
    frame = pair.receive()
    back = decode_value(frame.body, frame.buffers)
    collector, pusher = results
    answered = (ResultKind.OUTPUT, 0, *ValueEncoder().encode(back))
    pushing = threading.Thread(target=pusher.push, args=answered, kwargs={"busy_us": 5})  # it returns when nobody holds the buffers
    pushing.start()
    assert collector.sockets[0].poll(WAIT_MS)
    answer = collector.receive()
    assert answer is not None
    assert (answer.kind, answer.seq, answer.rank, answer.busy_us) == (ResultKind.OUTPUT, 0, 3, 5)
    again = decode_value(answer.body, answer.buffers)
    np.testing.assert_array_equal(again["x"], array)
    np.testing.assert_array_equal(again["y"][0], array[: size // 2])
    np.testing.assert_array_equal(again["y"][1], array[::3])
    del answer, again
    pushing.join(WAIT_MS / 1000)
    assert not pushing.is_alive()


def test_the_collector_never_waits_and_drops_foreign_answers(results: tuple[ResultCollector, ResultPusher]) -> None:
    collector, pusher = results
    with pytest.raises(zmq.Again):
        collector.receive()
    pusher.socket.send(pack_result_header(ResultKind.ACK, EPOCH + 1, 0, 0, 0))
    pusher.push(ResultKind.ACK, 4)
    assert collector.sockets[0].poll(WAIT_MS)
    assert collector.receive() is None
    frame = collector.receive()
    assert frame is not None
    assert (frame.seq, collector.dropped_foreign) == (4, 1)


def test_a_bad_answer_does_not_take_the_next_with_it(results: tuple[ResultCollector, ResultPusher]) -> None:
    collector, pusher = results
    pusher.socket.send_multipart([b"rubbish", b"of", b"several parts"])
    pusher.push(ResultKind.BYE, 0)
    assert collector.sockets[0].poll(WAIT_MS)
    with pytest.raises(BadFrameError):
        collector.receive()
    frame = collector.receive()
    assert frame is not None
    assert frame.kind is ResultKind.BYE


@pytest.mark.parametrize("others", [[], ["inproc://bound"]], ids=["alone", "after another"])
@pytest.mark.parametrize("end", [StepPublisher, ResultCollector, ControlServer], ids=lambda end: end.__name__)
def test_an_endpoint_that_cannot_be_bound_is_named_and_leaves_no_socket(end: Any, others: list[str]) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    options = {} if end is ControlServer else {"epoch": 1}
    with pytest.raises(LaunchError, match="cannot bind ipc:///nowhere/at/all"):
        end(context, [*others, "ipc:///nowhere/at/all"], **options)
    context.term()  # would wait for ever for a socket that was left open
