"""A rank's place in the pipeline of stages: what it takes from the stage before, and what it hands to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .communicators.communicator import Communicator


class PipelineStage:
    """Passes the hidden states of a step on, as one tensor whose shape both ends know from the step.

    Args:
        communicator: of the pp axis, whose places are the stages.
        hidden_size: D.
        dtype, device: of the hidden states.
    """

    def __init__(self, communicator: Communicator, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._communicator = communicator
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self.index = communicator.rank
        self.num_stages = communicator.size

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1

    def receive(self, num_tokens: int) -> Tensor | None:
        """Return the hidden states [num_tokens, D] of the stage before; None on the first stage."""
        if self.is_first:
            return None
        hidden = torch.empty(num_tokens, self._hidden_size, dtype=self._dtype, device=self._device)
        return self._communicator.receive(hidden, self.index - 1)

    def send(self, hidden: Tensor) -> None:
        """Hand hidden states [T, D] to the next stage, which there must be."""
        self._communicator.send(hidden, self.index + 1)
