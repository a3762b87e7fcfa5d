"""The mixtures of a rank's layers, by the number of the layer: what their experts had to do, and their change to another placement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ..expert_placement import check_placement
from .causal_model import CausalModel
from .layers import WeightShard
from .loading import find_tensors, read_shards
from .moe import Mixture


class MixtureLayers:
    """Counts and moves experts while the model is in use.

    A change has two parts, so that all ranks change or none does: ``stage`` reads files and can fail, ``change`` cannot.

    Args:
        model: of this rank, loaded.
        directory: of its checkpoint.
        first_layer: the first of the rank's layers.
    """

    def __init__(self, model: CausalModel, directory: Path, first_layer: int) -> None:
        mixtures = ((first_layer + index, layer.mlp) for index, layer in enumerate(model.layers))
        self._mixtures = {number: mixture for number, mixture in mixtures if isinstance(mixture, Mixture)}
        self._directory = directory
        self._files: dict[str, Path] = {}  # of every tensor, once they are asked for
        self._staged: dict[int, Callable[[], None]] = {}

    def take_loads(self) -> list[list[int]]:
        """Return [layer, tokens of each expert on this rank since the last call] of each mixture."""
        return [[number, *mixture.experts.take_loads()] for number, mixture in self._mixtures.items()]

    @torch.inference_mode()
    def stage(self, layer: int, placement: Sequence[int]) -> None:
        """Load what this rank lacks for a layer's next placement; nothing where the layer is on another stage.

        Raises:
            ConfigError: no placement of the layer's experts.
            CheckpointError: a file that cannot be read.
        """
        self._staged.clear()  # of a change that did not come about
        mixture = self._mixtures.get(layer)
        if mixture is not None:
            checked = check_placement(placement, mixture.experts.mixture.num_experts, mixture.experts.num_copies)
            self._staged[layer] = mixture.stage(checked, self._fill)

    def _fill(self, shards: Iterator[WeightShard]) -> None:
        self._files = self._files or find_tensors(self._directory)
        for _ in read_shards(shards, self._files):
            pass

    @torch.inference_mode()
    def change(self, layer: int) -> None:
        """Go over to the placement that was staged last for ``layer``."""
        change = self._staged.pop(layer, None)
        if change is not None:
            change()
