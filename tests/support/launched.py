"""Workers that say which launch they belong to, and workers that answer with more than may travel."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

import zspmd


class Named(zspmd.Worker):
    """Answers a step with it and with the launch that this rank was told."""

    def step(self, inputs: Any) -> dict[str, Any]:
        return {"launch_id": self.ctx.facts.launch_id, "port": int(os.environ["MASTER_PORT"]), "inputs": inputs}


class Generous(zspmd.Worker):
    """Answers with what its input asks for, in a step and in a call."""

    def step(self, inputs: Any) -> Any:
        return self.give(inputs)

    @zspmd.rpc
    def give(self, what: str) -> Any:
        if what == "1025 large arrays":
            return [np.zeros(2000)] * 1025
        if what == "1024 large arrays":
            return [np.zeros(2000)] * 1024
        if what == "a body beyond 64 MiB":
            return [bytes(1 << 25)] * 2
        if what == "a set":
            return {"ranks": [{self.ctx.rank}]}
        return what
