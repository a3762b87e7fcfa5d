"""The relay of a node over real sockets: what passes, in which form, and how it ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq
from support.contexts import KeepingContext
from support.driver_ends import EPOCH, DriverEnds
from support.polling import wait_until

from zspmd.errors import ConfigError, InsecureEndpointError, LaunchError
from zspmd.runtime.launch.agent_protocol import RelayOrder
from zspmd.runtime.launch.nodes.relay import BREAK_EVEN_RANKS, Relay, choose_relay
from zspmd.transport.chunks import CHUNK_BYTES
from zspmd.transport.frames import StepFrame, StepKind
from zspmd.transport.security import RankKeys
from zspmd.transport.sockets import StepSubscriber

NODE = 1
RANKS = (1, 2)
WAIT_MS = 5000
SOON_S = 5.0


class RelayedNode:
    """A relay between a driver's ends and the ranks of a node."""

    def __init__(self, driver: DriverEnds, directory: Path) -> None:
        self.driver = driver
        self.endpoint = f"ipc://{directory}/step"
        self.reasons: list[str] = []
        self.relay = Relay(self.order(driver.door.node_keys(NODE)), self.reasons.append)

    def order(self, keys: RankKeys) -> RelayOrder:
        return RelayOrder(self.driver.publisher.endpoints[0], self.endpoint, keys.public, keys.secret, keys.server)

    def join(self, *ranks: int, on_gap: Callable[[int], None] = lambda seq: None) -> list[StepSubscriber]:
        """Start the relay, and return subscribers that the driver has heard of."""
        self.relay.start()
        ends = [
            StepSubscriber(self.driver.context, self.endpoint, epoch=EPOCH, rank=rank, on_gap=on_gap, is_relayed=True) for rank in ranks
        ]
        self.driver.wait_joined(*ranks)
        return ends


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[RelayedNode]:
    context = KeepingContext()
    driver = DriverEnds(context, 3, {NODE: RANKS})
    made = RelayedNode(driver, tmp_path)
    yield made
    made.relay.close()
    driver.close_door()
    context.destroy(linger=0)


def received(end: StepSubscriber) -> StepFrame:
    frame = end.receive(WAIT_MS)
    assert frame is not None
    return frame


def relay_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zspmd-relay"]


async def test_every_frame_reaches_every_rank_whatever_its_size(node: RelayedNode) -> None:
    ends = node.join(*RANKS)
    sizes = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 1 << 20, 5 << 20)
    buffers = [bytes([index]) * size for index, size in enumerate(sizes)]
    for number in range(3):
        node.driver.publisher.publish(StepKind.STEP, b"%d" % number, buffers)
    for end in ends:
        for number in range(3):
            frame = received(end)
            assert (frame.seq, bytes(frame.body)) == (number, b"%d" % number)
            assert [bytes(buffer) for buffer in frame.buffers] == buffers
    assert (node.reasons, node.driver.events) == ([], [])


async def test_a_frame_is_sent_again_to_one_rank(node: RelayedNode) -> None:
    asker, other = node.join(*RANKS)
    node.driver.publisher.publish(StepKind.STEP)
    node.driver.publisher.replay(RANKS[0], 0)
    node.driver.publisher.publish(StepKind.STEP)
    for end, num_twice in ((asker, 1), (other, 0)):
        assert [received(end).seq for _ in range(2)] == [0, 1]
        assert end.dropped_duplicates == num_twice


async def test_a_lost_frame_is_asked_for_through_it(node: RelayedNode) -> None:
    gaps: list[int] = []
    (end,) = node.join(1, on_gap=gaps.append)
    end.next_seq = 0
    node.driver.publisher._kept.append((b"", ()))  # as if the first frame had been lost on the way
    node.driver.publisher.next_seq = 1
    node.driver.publisher.tick()
    assert end.receive(200) is None
    assert gaps == [0]


async def test_a_rank_that_leaves_is_seen_at_the_driver(node: RelayedNode) -> None:
    leaver, _ = node.join(*RANKS)
    leaver.close()
    while (change := node.driver.subscription()) is None or change[1]:
        pass
    assert change == (RANKS[0], False)


async def test_a_rank_of_another_node_gets_nothing_in_its_name(node: RelayedNode) -> None:
    node.relay.start()
    intruder = StepSubscriber(node.driver.context, node.endpoint, epoch=EPOCH, rank=0, on_gap=lambda seq: None, is_relayed=True)
    while not node.driver.events:
        assert node.driver.subscription() is None
    assert node.driver.events[0][:2] == ("impostor", None)
    assert node.driver.door.impostor_frames == 1
    intruder.close()


async def test_a_rank_that_reads_nothing_holds_up_no_other(node: RelayedNode) -> None:
    reader, idle = node.join(*RANKS)
    for number in range(500):
        node.driver.publisher.publish(StepKind.STEP)
        assert received(reader).seq == number
    assert [received(idle).seq for _ in range(500)] == list(range(500))


async def test_a_lost_connection_is_told_at_once_and_not_taken_up_again(node: RelayedNode) -> None:
    node.join(1)
    started = time.monotonic()
    node.driver.publisher.close()
    await wait_until(lambda: node.reasons)
    assert time.monotonic() - started < SOON_S
    assert node.reasons == ["the step connection to the driver broke; what was on its way is lost, so this relay ends"]
    await asyncio.sleep(0)
    node.relay.close()
    assert len(node.reasons) == 1
    assert relay_threads() == []


async def test_a_refused_key_is_told(node: RelayedNode) -> None:
    public, secret = zmq.curve_keypair()
    relay = Relay(node.order(RankKeys(public, secret, node.driver.door.node_keys(NODE).server)), node.reasons.append)
    relay.start()
    await wait_until(lambda: node.reasons)
    assert node.reasons[0].startswith("the driver refused the step connection: this relay's key is none of its launch")
    relay.close()
    assert relay_threads() == []


@pytest.mark.parametrize("num_ranks", [0, 2])
async def test_closing_is_quick_and_leaves_no_thread(node: RelayedNode, num_ranks: int) -> None:
    node.join(*RANKS[:num_ranks])
    for _ in range(300):  # some are on their way
        node.driver.publisher.publish(StepKind.STEP, b"", [bytes(1 << 10)])
    assert len(relay_threads()) == 1
    started = time.monotonic()
    for _ in range(2):
        node.relay.close()
    assert time.monotonic() - started < 1.0
    assert relay_threads() == []
    assert node.reasons == []


async def test_one_that_was_never_started_closes(node: RelayedNode) -> None:
    node.relay.close()
    assert (relay_threads(), node.reasons) == ([], [])


async def test_what_cannot_be_bound_is_an_error_and_leaves_nothing(node: RelayedNode) -> None:
    node.endpoint = "ipc:///nowhere/at/all"
    relay = Relay(node.order(node.driver.door.node_keys(NODE)), node.reasons.append)
    with pytest.raises(LaunchError, match="cannot bind ipc:///nowhere/at/all"):
        relay.start()
    relay.close()
    assert relay_threads() == []


async def test_a_relay_without_keys_does_not_start(node: RelayedNode) -> None:
    relay = Relay(RelayOrder(node.driver.publisher.endpoints[0], node.endpoint, b"", b"", b""), node.reasons.append)
    with pytest.raises(InsecureEndpointError, match="the public key has 0 characters"):
        relay.start()
    relay.close()


@pytest.mark.parametrize(
    ("mode", "num_local_ranks", "is_chosen"),
    [
        ("off", 64, False),
        ("on", 1, True),
        ("auto", 1, False),
        ("auto", BREAK_EVEN_RANKS - 1, False),
        ("auto", BREAK_EVEN_RANKS, True),
        ("auto", 64, True),
    ],
)
def test_which_nodes_have_one(mode: str, num_local_ranks: int, is_chosen: bool) -> None:
    assert choose_relay(mode, num_local_ranks) is is_chosen


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="relay is 'maybe'; choose one of auto, on, off"):
        choose_relay("maybe", 2)
