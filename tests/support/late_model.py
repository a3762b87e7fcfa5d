"""The engine's model worker, of which the ranks of every replica but the first answer late."""

from __future__ import annotations

import time
from typing import Any

from zspmd.workers.model_worker import ModelWorker

WORKER = "support.late_model:LateModel"
LATE_S = 0.03


class LateModel(ModelWorker):
    """Computes as its base does."""

    def step(self, inputs: Any) -> list[object]:
        answer = super().step(inputs)
        if self.ctx.mesh.group("dp").index and self.ctx.mesh.group("pp").is_last:
            time.sleep(LATE_S)
        return answer
