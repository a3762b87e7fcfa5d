"""Tokens of all replicas brought to every rank that shares the experts, and the parts of their sums brought back.

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
from .expert_axis import Compute, Route


class ReplicaCommunicator(Communicator, Protocol):
    """The collectives of the data-parallel axis."""

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` [size, *shape] over the ranks and return the row [*shape] of this one."""


class GatherExchange:
    """Every rank routes all tokens and computes those of its own experts.

    Args:
        communicator: the tensor-parallel axis.
        replicas: the data-parallel axis.
    """

    def __init__(self, communicator: Communicator, replicas: ReplicaCommunicator) -> None:
        self._replicas = replicas
        self.rank = replicas.rank * communicator.size + communicator.rank
        self.size = replicas.size * communicator.size

    def run(self, x: Tensor, counts: Sequence[int], route: Route, compute: Compute) -> Tensor:
        """Return this rank's parts, as ``Exchange.run``."""
        every = self._gather(x, counts)
        return self._scatter(compute(every, *route(every, 0)), counts)[: len(x)]

    def _gather(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the tokens of all replicas in order, [sum of counts, D], zeros after those of one that has fewer."""
        rows = self._replicas.all_gather(F.pad(x, (0, 0, 0, max(counts) - len(x))))  # [replicas, longest, D]
        return torch.cat([rows[replica, :count] for replica, count in enumerate(counts)])

    def _scatter(self, parts: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the sum, over the replicas' ranks at this place, of the ``parts`` [sum of counts, D] that are this replica's."""
        rows = parts.new_zeros(len(counts), max(counts), parts.shape[1])
        for row, part in zip(rows, torch.split(parts, list(counts)), strict=True):
            row[: len(part)] = part
        return self._replicas.reduce_scatter(rows)
