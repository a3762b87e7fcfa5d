"""A transport of a rank that lies: preload this module, and say in ``FORGER`` how rank 1 does it."""

from __future__ import annotations

import os
from typing import Any

from zspmd.transport.control_sockets import ControlClient
from zspmd.transport.frames import ResultKind
from zspmd.transport.records import Beat
from zspmd.transport.sockets import ResultPusher, StepSubscriber
from zspmd.workers import main
from zspmd.workers.bootstrap import hello, read_bootstrap

FORGER = "ZSPMD_TEST_FORGER"
ANSWER, HELLO, GARBAGE = "answer", "hello", "garbage"


class ForgingPusher(ResultPusher):
    """Answers each step in the name of rank 0 too, before its own answer; or with garbage."""

    def push(self, kind: ResultKind, seq: int, *args: Any, **kwargs: Any) -> None:
        if self.rank == 1 and kind is ResultKind.OUTPUT:
            if os.environ[FORGER] == ANSWER:
                self.rank = 0
                super().push(kind, seq, *args, **kwargs)
                self.rank = 1
            elif os.environ[FORGER] == GARBAGE:
                self.socket.send(b"garbage")
        super().push(kind, seq, *args, **kwargs)


class ForgingSubscriber(StepSubscriber):
    """Says hello as rank 0 too, and beats for it."""

    def __init__(self, context: Any, *args: Any, rank: int, **kwargs: Any) -> None:
        super().__init__(context, *args, rank=rank, **kwargs)
        if rank == 1 and os.environ[FORGER] == HELLO:
            bootstrap = read_bootstrap()
            self.client = ControlClient(context, bootstrap.control_endpoint, bootstrap.keys)
            self.client.send(hello(bootstrap, 0, "beat"))
            self.client.send(Beat(phase="idle", seq=99, done_seq=99, step_id=99, memory_bytes=1))


vars(main).update(ResultPusher=ForgingPusher, StepSubscriber=ForgingSubscriber)
