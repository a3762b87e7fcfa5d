"""A transport that loses what a test asks for: preload this module, and say in ``LOSE`` which frames which rank loses, and how often.

monkeypatch.setenv(LOSE, "1:3-5x2")     rank 1 loses frames 3 to 5 the first two times that they come
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

from zspmd.transport.frames import StepFrame, StepKind
from zspmd.transport.sockets import StepSubscriber
from zspmd.workers import main

LOSE = "ZSPMD_TEST_LOSE"


class LosingSubscriber(StepSubscriber):
    """Loses some frames; ticks are left alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rank, first, last, times = map(int, re.split(r"[:x-]", os.environ[LOSE]))
        self._to_lose = Counter(dict.fromkeys(range(first, last + 1), times) if rank == self.rank else {})

    def _read(self) -> StepFrame | None:
        while True:
            frame = super()._read()
            if frame is None or frame.kind is StepKind.TICK or self._to_lose[frame.seq] <= 0:
                return frame
            self._to_lose[frame.seq] -= 1


vars(main)["StepSubscriber"] = LosingSubscriber
