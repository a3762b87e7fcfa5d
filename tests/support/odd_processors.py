"""The engine's model worker, each rank of which says that its processor is of another kind."""

from __future__ import annotations

import zspmd
from zspmd.workers.model_worker import ModelWorker

WORKER = "support.odd_processors:OddProcessor"


class OddProcessor(ModelWorker):
    """Computes as its base does."""

    @zspmd.rpc
    def describe_processor(self) -> str:
        return f"kind {self.ctx.rank}"
