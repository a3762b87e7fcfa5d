"""A rank's life after set-up: take the next frame, do it, answer; nothing else is ever waited for."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ..errors import BadFrameError
from ..transport.codec import ValueEncoder, decode_value
from ..transport.frames import Buffer, ResultKind, StepFrame, StepKind
from ..transport.records import Failure
from ..transport.schema import pack_record
from .context import RankStatus
from .worker import Worker, find_rpc

MAX_MESSAGE = 32_768  # characters; with the traceback below a record's 1 MiB even at four bytes each
MAX_TRACEBACK = 131_072
IDLE_MS = 1000  # how often an idle rank looks whether its parent lives


class FrameSource(Protocol):
    """Where steps and calls come from: a ``StepSubscriber``, or a recording."""

    def receive(self, timeout_ms: int) -> StepFrame | None:
        """Return the next frame; None when ``timeout_ms`` passed without one."""


class AnswerSink(Protocol):
    """Where answers go: a ``ResultPusher``, or a comparison with what was recorded."""

    rank: int

    def push(
        self,
        kind: ResultKind,
        seq: int,
        body: bytes = b"",
        buffers: Sequence[Buffer] = (),
        *,
        busy_us: int = 0,
        received_ns: int = 0,
    ) -> None:
        """Take one answer; the buffers are the caller's again when it returns."""


class StepLoop:
    """Runs a worker from the SYNC frame to the STOP frame."""

    def __init__(
        self,
        worker: Worker,
        subscriber: FrameSource,
        pusher: AnswerSink,
        status: RankStatus,
        *,
        output_ranks: Sequence[int],
        check_parent: Callable[[], None],
    ) -> None:
        self._worker = worker
        self._subscriber = subscriber
        self._pusher = pusher
        self._status = status
        self._answers_steps = pusher.rank in output_ranks
        self._check_parent = check_parent
        self._encoder = ValueEncoder()

    def run(self) -> None:
        """Serve frames until STOP; what the worker raises in a step, or a broken stream, ends it."""
        goes_on = True
        while goes_on:
            frame = self.take(IDLE_MS)
            if frame is None:
                self._check_parent()
            else:
                goes_on = self.serve(frame)

    def take(self, timeout_ms: int) -> StepFrame | None:
        """Wait for the next frame, which counts as begun from here on; None when ``timeout_ms`` passed without one."""
        self._status.phase = "idle"
        frame = self._subscriber.receive(timeout_ms)
        if frame is not None:
            self._status.seq = frame.seq
        return frame

    def serve(self, frame: StepFrame) -> bool:
        """Do what the frame asks and answer it; returns whether another may follow."""
        received_ns = time.monotonic_ns()
        if frame.kind is StepKind.STEP:
            self._step(frame, received_ns)
        elif frame.kind is StepKind.CALL:
            self._call(frame, received_ns)
        elif frame.kind is StepKind.SYNC:
            self._pusher.push(ResultKind.SYNC_ACK, frame.seq)
        else:
            self._pusher.push(ResultKind.BYE, frame.seq)
            return False
        self._status.done_seq = frame.seq
        return True

    def _step(self, frame: StepFrame, received_ns: int) -> None:
        status = self._status
        status.step_id += 1
        status.phase = "step"
        output = self._worker.step(decode_value(frame.body, frame.buffers))
        if self._answers_steps:
            body, buffers = self._encoder.encode(output)
            self._push(ResultKind.OUTPUT, frame, received_ns, body, buffers)
        else:
            self._push(ResultKind.ACK, frame, received_ns)
        status.done_step_id = status.step_id

    def _call(self, frame: StepFrame, received_ns: int) -> None:
        name, args, kwargs, ranks = _check_call(decode_value(frame.body, frame.buffers))
        if self._pusher.rank not in ranks:
            self._push(ResultKind.ACK, frame, received_ns)
            return
        self._status.phase = "call"
        kind, buffers = ResultKind.REPLY, list[Buffer]()
        try:
            body, buffers = self._encoder.encode(find_rpc(self._worker, name)(*args, **kwargs))
        except Exception as error:  # of the called method: the caller gets it, the rank goes on
            kind, body = ResultKind.CALL_ERROR, pack_record(describe_failure(error, self._status))
        self._push(kind, frame, received_ns, body, buffers)

    def _push(self, kind: ResultKind, frame: StepFrame, received_ns: int, body: bytes = b"", buffers: Sequence[Buffer] = ()) -> None:
        busy_us = (time.monotonic_ns() - received_ns) // 1000
        self._pusher.push(kind, frame.seq, body, buffers, busy_us=busy_us, received_ns=received_ns)


def describe_failure(error: BaseException, status: RankStatus) -> Failure:
    """Return what the driver is told about an exception; long texts keep their end, where the cause is."""
    kind = type(error)
    return Failure(
        exception_type=f"{kind.__module__}.{kind.__qualname__}"[:512],
        message=_printable(str(error))[:MAX_MESSAGE],
        traceback=_printable("".join(traceback.format_exception(kind, error, error.__traceback__)))[-MAX_TRACEBACK:],
        phase=status.phase,
        step_id=status.step_id,
    )


def _printable(text: str) -> str:
    """Escape lone surrogates, as in the file names of ``os.fsdecode``: they cannot be sent."""
    return text.encode("utf-8", "backslashreplace").decode()


def _check_call(value: Any) -> tuple[str, list[Any], dict[str, Any], list[int]]:
    wanted = (str, list, dict, list)
    if not isinstance(value, list) or len(value) != 4 or any(type(v) is not w for v, w in zip(value, wanted)):
        raise BadFrameError("the body of a call is not [name, args, kwargs, ranks]")
    name, args, kwargs, ranks = value
    return name, args, kwargs, ranks
