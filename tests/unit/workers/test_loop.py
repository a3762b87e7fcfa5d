"""A rank's loop over real sockets of one process: each frame is answered once, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import zmq

import zspmd
from zspmd.errors import BadFrameError
from zspmd.transport.codec import ValueEncoder, decode_value
from zspmd.transport.frames import ResultFrame, ResultKind, StepKind, pack_step_header
from zspmd.transport.records import MAX_RECORD_BYTES, Failure, unpack_record
from zspmd.transport.schema import pack_record
from zspmd.transport.sockets import ResultCollector, ResultPusher, StepPublisher, StepSubscriber
from zspmd.workers.context import RankStatus
from zspmd.workers.loop import StepLoop, describe_failure

EPOCH, WAIT_MS = 3, 5000


class Recorder(zspmd.Worker):
    """Answers with its phase and what it got; ``loop_status`` is the loop's."""

    loop_status: RankStatus

    def step(self, inputs: Any) -> Any:
        if inputs == "raise":
            raise RuntimeError("a step goes wrong")
        if inputs == "unsendable":
            return {"x": {1, 2}}
        return {"inputs": inputs, "phase": self.loop_status.phase, "step_id": self.loop_status.step_id}

    @zspmd.rpc
    def add(self, a: int, *, b: int) -> int:
        return a + b

    @zspmd.rpc
    def fail(self, message: str) -> None:
        raise KeyError(message)

    @zspmd.rpc
    def unsendable(self) -> object:
        return object()


class Rig:
    """A driver's ends, and a loop that is run over what has been published."""

    def __init__(self, output_ranks: tuple[int, ...] = (0,)) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.publisher = StepPublisher(self.context, ["inproc://step"], epoch=EPOCH)
        self.collector = ResultCollector(self.context, ["inproc://result"], epoch=EPOCH)
        self.pusher = ResultPusher(self.context, "inproc://result", epoch=EPOCH, rank=0)
        self.subscriber = StepSubscriber(
            self.context, "inproc://step", epoch=EPOCH, rank=0, on_gap=lambda seq: self.pusher.push(ResultKind.GAP, seq)
        )
        for _ in range(2):
            assert self.publisher.sockets[0].poll(WAIT_MS)
            self.publisher.read_subscription()
        self.status = RankStatus()
        worker = Recorder()
        worker.loop_status = self.status
        self.loop = StepLoop(
            worker, self.subscriber, self.pusher, self.status, output_ranks=output_ranks, check_parent=lambda: pytest.fail("idle")
        )

    def publish(self, kind: StepKind, value: object = None) -> None:
        self.publisher.publish(kind, *ValueEncoder().encode(value))

    def call(self, name: str, *args: object, ranks: tuple[int, ...] = (0,), **kwargs: object) -> None:
        self.publish(StepKind.CALL, [name, list(args), kwargs, list(ranks)])

    def run(self) -> list[ResultFrame]:
        """Publish STOP, run the loop to its end and return the answers."""
        self.publisher.publish(StepKind.STOP)
        self.loop.run()
        return self.answers()

    def answers(self) -> list[ResultFrame]:
        frames: list[ResultFrame] = []
        while self.collector.sockets[0].poll(0):
            frame = self.collector.receive()
            assert frame is not None
            frames.append(frame)
        return frames

    def close(self) -> None:
        for end in (self.publisher, self.collector, self.subscriber, self.pusher):
            end.close()
        self.context.term()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


def value_of(frame: ResultFrame) -> Any:
    return decode_value(frame.body, frame.buffers)


def failure_of(frame: ResultFrame) -> Failure:
    record = unpack_record(frame.body)
    assert isinstance(record, Failure)
    return record


def test_each_frame_is_answered_once_in_order(rig: Rig) -> None:
    rig.publish(StepKind.SYNC)
    rig.publish(StepKind.STEP, "one")
    rig.call("add", 1, b=2)
    rig.call("add", 1, b=2, ranks=(1,))
    rig.publish(StepKind.STEP, "two")
    answers = rig.run()
    kinds = [ResultKind.SYNC_ACK, ResultKind.OUTPUT, ResultKind.REPLY, ResultKind.ACK, ResultKind.OUTPUT, ResultKind.BYE]
    assert [(frame.kind, frame.seq) for frame in answers] == list(zip(kinds, range(6)))
    assert value_of(answers[1]) == {"inputs": "one", "phase": "step", "step_id": 0}
    assert value_of(answers[2]) == 3
    assert len(answers[3].body) == 0
    assert value_of(answers[4])["step_id"] == 1
    assert (rig.status.seq, rig.status.done_seq, rig.status.step_id) == (5, 4, 1)


def test_a_rank_without_output_only_acknowledges() -> None:
    rig = Rig(output_ranks=(1, 2))
    rig.publish(StepKind.STEP, "one")
    answers = rig.run()
    assert [(frame.kind, len(frame.body)) for frame in answers] == [(ResultKind.ACK, 0), (ResultKind.BYE, 0)]
    rig.close()


def test_large_arrays_pass_through(rig: Rig) -> None:
    array = np.arange(300_000)
    rig.publish(StepKind.STEP, [array])
    rig.publisher.publish(StepKind.STOP)
    running = threading.Thread(target=rig.loop.run)  # it goes on when nobody holds the answer
    running.start()
    assert rig.collector.sockets[0].poll(WAIT_MS)
    (frame,) = rig.answers()
    np.testing.assert_array_equal(value_of(frame)["inputs"][0], array)
    del frame
    running.join(WAIT_MS / 1000)
    assert not running.is_alive()


@pytest.mark.parametrize(
    ("name", "args", "kind", "words"),
    [
        ("fail", ["boom"], "builtins.KeyError", "'boom'"),
        ("absent", [], "builtins.AttributeError", "no method 'absent' marked"),
        ("add", [1, 2, 3], "builtins.TypeError", "takes 2 positional arguments"),
        ("unsendable", [], "builtins.TypeError", "value is a builtins.object"),
    ],
    ids=["raises", "absent", "wrong arguments", "answer that may not travel"],
)
def test_a_call_that_fails_is_told_and_the_rank_goes_on(rig: Rig, name: str, args: list[object], kind: str, words: str) -> None:
    rig.call(name, *args)
    rig.publish(StepKind.STEP, "next")
    answers = rig.run()
    assert [frame.kind for frame in answers] == [ResultKind.CALL_ERROR, ResultKind.OUTPUT, ResultKind.BYE]
    failure = failure_of(answers[0])
    assert (failure.exception_type, failure.phase, failure.step_id) == (kind, "call", -1)
    assert words in failure.message
    assert f"{kind.split('.')[1]}" in failure.traceback


@pytest.mark.parametrize(("inputs", "error"), [("raise", RuntimeError), ("unsendable", TypeError)])
def test_a_step_that_fails_ends_the_loop_unanswered(rig: Rig, inputs: str, error: type[Exception]) -> None:
    rig.publish(StepKind.STEP, inputs)
    with pytest.raises(error):
        rig.run()
    assert rig.answers() == []
    assert (rig.status.phase, rig.status.seq, rig.status.done_seq) == ("step", 0, -1)


@pytest.mark.parametrize("body", [[], ["add", [], {}], [1, [], {}, []], ["add", {}, {}, []], "add"], ids=str)
def test_a_malformed_call_ends_the_loop(rig: Rig, body: object) -> None:
    rig.publish(StepKind.CALL, body)
    with pytest.raises(BadFrameError, match="the body of a call is not"):
        rig.run()


def test_nothing_beyond_a_gap_is_done_before_it_is_filled(rig: Rig) -> None:
    rig.publisher.sockets[0].send(pack_step_header(StepKind.STOP, EPOCH, 1))
    rig.loop._check_parent = lambda: rig.publisher.sockets[0].send(pack_step_header(StepKind.SYNC, EPOCH, 0))  # once the rank waits
    rig.loop.run()
    assert [(frame.kind, frame.seq) for frame in rig.answers()] == [(ResultKind.GAP, 0), (ResultKind.SYNC_ACK, 0), (ResultKind.BYE, 1)]


def test_an_idle_rank_looks_after_its_parent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zspmd.workers.loop.IDLE_MS", 1)

    def orphaned() -> None:
        raise InterruptedError("no parent")

    rig.loop._check_parent = orphaned
    with pytest.raises(InterruptedError):
        rig.loop.run()


@pytest.mark.parametrize("text", ["x" * 1_000_000, "\N{GRINNING FACE}" * 500_000, "name \udcff\udc80"], ids=["long", "wide", "surrogates"])
def test_any_exception_can_be_told(text: str) -> None:
    try:
        raise ValueError(text)
    except ValueError as error:
        failure = describe_failure(error, RankStatus(phase="step", step_id=4))
    packed = pack_record(failure)
    assert len(packed) <= MAX_RECORD_BYTES
    assert unpack_record(packed) == failure
    assert (failure.exception_type, failure.phase, failure.step_id) == ("builtins.ValueError", "step", 4)
    assert failure.message[:5] in ("xxxxx", "\N{GRINNING FACE}" * 5, "name ")
