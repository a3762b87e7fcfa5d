"""A transport that loses frames: preload this module, and every rank's subscriber drops some of what arrives.

    zspmd.launch(..., preload=("support.lossy",))

It takes the place of ``StepSubscriber`` in a rank's entry and nothing else. Which frames are lost follows from the rank.
"""

from __future__ import annotations

import random
from typing import Any

from zspmd.transport.frames import StepFrame
from zspmd.transport.sockets import StepSubscriber
from zspmd.workers import main

LOSS = 0.02


class LossySubscriber(StepSubscriber):
    """Loses one frame in fifty, those that were sent again and ticks included."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._random = random.Random(self.rank)

    def _read(self) -> StepFrame | None:
        while True:
            frame = super()._read()
            if frame is None or self._random.random() >= LOSS:
                return frame


vars(main)["StepSubscriber"] = LossySubscriber
