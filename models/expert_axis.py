"""The ranks that a mixture's experts are spread over: those of one replica, or of all data-parallel replicas together.

Over all replicas each rank gets every replica's tokens, computes what its own experts add to them, and the parts are summed where the
tokens came from. Each replica calls it in every step, with no tokens if it has none: how many the others have is known from the step, so
that nobody asks.

    replica 0   x [T0, D] --+-- all-gather --> [T0 + T1, D] -- own experts --> parts -- reduce-scatter --> [T0, D]
    replica 1   x [T1, D] --+                                                                          --> [T1, D]

T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .communicator import Communicator


class ReplicaCommunicator(Communicator, Protocol):
    """The collectives of the data-parallel axis."""

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` [size, *shape] over the ranks and return the row [*shape] of this one."""


class ExpertAxis:
    """A rank's place among those that share the experts.

    Args:
        communicator: the tensor-parallel axis.
        replicas: the data-parallel axis, where the experts are spread over all replicas; None where each replica has all of them.
    """

    def __init__(self, communicator: Communicator, replicas: ReplicaCommunicator | None = None) -> None:
        self._replicas = replicas
        self._counts: Sequence[int] = ()
        self.rank = communicator.rank + (0 if replicas is None else replicas.rank * communicator.size)
        self.size = communicator.size * (1 if replicas is None else replicas.size)

    @property
    def is_lockstep(self) -> bool:
        """Whether replicas need each other in every step."""
        return self._replicas is not None

    def begin_step(self, counts: Sequence[int]) -> None:
        """Say how many tokens each replica computes in the step that begins; at least one of them has some."""
        self._counts = counts

    def gather(self, x: Tensor) -> Tensor:
        """Return the tokens of all replicas in order, [sum of T, D], of which ``x`` [T, D] are this one's."""
        if self._replicas is None:
            return x
        longest = max(self._counts)
        rows = self._replicas.all_gather(F.pad(x, (0, 0, 0, longest - len(x))))  # [replicas, longest, D]
        return torch.cat([rows[replica, :count] for replica, count in enumerate(self._counts)])

    def scatter(self, parts: Tensor) -> Tensor:
        """Return the sum [T, D], over the replicas' ranks at this place, of ``parts`` [sum of T, D] for this replica's tokens."""
        if self._replicas is None:
            return parts
        rows = parts.new_zeros(len(self._counts), max(self._counts), parts.shape[1])
        for row, part in zip(rows, torch.split(parts, list(self._counts)), strict=True):
            row[: len(part)] = part
        return self._replicas.reduce_scatter(rows)[: self._counts[self._replicas.rank]]
