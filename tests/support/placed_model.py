"""The engine's model worker, which tells which experts its rank has."""

from __future__ import annotations

import zspmd
from zspmd.models.moe import Mixture
from zspmd.workers.model_worker import ModelWorker

WORKER = "support.placed_model:PlacedModel"


class PlacedModel(ModelWorker):
    """Computes as its base does."""

    @zspmd.rpc
    def placed(self) -> list[list[int]]:
        """Return the experts of each mixture on this rank, in the order of their copies."""
        return [list(layer.mlp.experts.placed) for layer in self._model.layers if isinstance(layer.mlp, Mixture)]
