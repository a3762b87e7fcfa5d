"""A transport that asks for what it has had: preload this module, and rank 1 reports frame 0 as missing when frame 1 arrives."""

from __future__ import annotations

from zspmd.transport.frames import StepFrame
from zspmd.transport.sockets import StepSubscriber
from zspmd.workers import main


class AmnesiacSubscriber(StepSubscriber):
    """Asks for frame 0, which every rank has acknowledged by then."""

    def _read(self) -> StepFrame | None:
        frame = super()._read()
        if frame is not None and frame.seq == 1 and self.rank == 1:
            self._on_gap(0)
        return frame


vars(main)["StepSubscriber"] = AmnesiacSubscriber
