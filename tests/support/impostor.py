"""A transport that speaks for a rank that does not exist: preload this module, and say in ``IMPOSTOR`` with which kind of answer."""

from __future__ import annotations

import os
from typing import Any

from zspmd.transport.frames import ResultKind
from zspmd.transport.records import Failure
from zspmd.transport.schema import pack_record
from zspmd.transport.sockets import ResultPusher
from zspmd.workers import main

IMPOSTOR = "ZSPMD_TEST_IMPOSTOR"
NO_RANK = 500
FAILURE = Failure(exception_type="builtins.ValueError", message="boom", traceback="", phase="step", step_id=0)


class ImpostorPusher(ResultPusher):
    """Answers frame 1 in the name of rank 500."""

    def push(self, kind: ResultKind, seq: int, body: bytes = b"", *args: Any, **kwargs: Any) -> None:
        if seq == 1:
            self.rank, kind = NO_RANK, ResultKind[os.environ[IMPOSTOR]]
            body = pack_record(FAILURE) if kind is ResultKind.ERROR else body
        super().push(kind, seq, body, *args, **kwargs)


vars(main)["ResultPusher"] = ImpostorPusher
