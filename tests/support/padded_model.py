"""The engine's model worker with a forward pass that takes long but no processor, so that a machine of few cores has balanced stages."""

from __future__ import annotations

import functools
import time
from typing import Any

from zspmd.workers.model_worker import ModelWorker

WORKER = "support.padded_model:PaddedModel"
PAD_S = 0.2  # so long that the milliseconds which a loaded machine takes for a message are little beside it


class PaddedModel(ModelWorker):
    """Computes as its base does, ``PAD_S`` later."""

    def setup(self, **worker_args: Any) -> None:
        super().setup(**worker_args)
        forward = self._model.forward

        @functools.wraps(forward)
        def padded(*args: Any, **options: Any) -> Any:
            time.sleep(PAD_S)
            return forward(*args, **options)

        setattr(self._model, "forward", padded)  # noqa: B010  # an assignment to a method is none to a type checker
