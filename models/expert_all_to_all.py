"""Each token sent to the ranks that have its experts, once to each of them, and the parts of its sum sent back.

    replica 0   x [T0, D] -- route --> rows of each rank -- all-to-all --> [R, D] -- own experts --> parts -- all-to-all --> sum [T0, D]

A row travels with its weights and copies, so that nobody routes it again. How many rows go to which rank follows from the routing, which
only the sender knows: a first small all-to-all has these counts, as a part of the exchange. Every rank enters the three in every mixture
layer, with no rows if it has none. The tensor-parallel ranks of a replica, which all have its tokens, share them out: each sends its part,
and the all-reduce at the end of the mixture puts the parts together.

T tokens of the replica, t those that this rank sends, R rows that it receives, D model, k experts a token, N ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..mixture_config import place_experts
from .communicator import Communicator
from .expert_axis import Compute, Route

_WEIGHT_BYTES = _COPY_BYTES = 4  # float32 and int32


class ExpertCommunicator(Communicator, Protocol):
    """The collectives of the expert axis."""

    def all_to_all(
        self, tensor: Tensor, *, send_counts: Sequence[int] | None = None, receive_counts: Sequence[int] | None = None
    ) -> Tensor:
        """Give each rank its rows of ``tensor`` and return the rows for this one; without counts each gets as many."""


class AllToAllExchange:
    """Every rank routes its own tokens and computes those that come to it.

    Args:
        communicator: the tensor-parallel axis.
        experts: the ranks that share the experts, tensor-parallel ranks next to each other.
        replica: this rank's data-parallel replica.
        top_k: k.
        num_copies: of a layer's experts.
        device: of the tokens.
    """

    def __init__(
        self, communicator: Communicator, experts: ExpertCommunicator, replica: int, *, top_k: int, num_copies: int, device: torch.device
    ) -> None:
        self._communicator = communicator
        self._experts = experts
        self._replica = replica
        self._top_k = top_k
        self._head_bytes = top_k * (_WEIGHT_BYTES + _COPY_BYTES)
        self.rank = experts.rank
        self.size = experts.size
        starts = [place_experts(num_copies, rank, experts.size).start for rank in range(1, experts.size)]
        self._starts = torch.tensor(starts, device=device)

    def run(self, x: Tensor, counts: Sequence[int], route: Route, compute: Compute) -> Tensor:
        """Return what all experts add to this rank's share of the tokens, zeros for the others, as ``Exchange.run``."""
        rank, size = self._communicator.rank, self._communicator.size
        start, end = len(x) * rank // size, len(x) * (rank + 1) // size
        weights, copies = self._route(x[start:end], sum(counts[: self._replica]) + start, route)
        is_sent = self._find_ranks(copies)
        ranks, rows = is_sent.nonzero(as_tuple=True)  # by rank, then by row
        sent = is_sent.sum(1)
        received = self._experts.all_to_all(sent)
        num_sent, num_received = sent.tolist(), received.tolist()  # on a GPU the host waits for the counts
        packed = self._pack(x[start:end], weights, copies).index_select(0, rows)
        packed = self._experts.all_to_all(packed, send_counts=num_sent, receive_counts=num_received)
        parts = compute(*self._unpack(packed, x))
        parts = self._experts.all_to_all(parts, send_counts=num_received, receive_counts=num_sent)
        places = is_sent.cumsum(0)[ranks, rows] - 1  # of a part among those of its token: equal sums in every run
        spread = torch.zeros(end - start, min(self._top_k, self.size), x.shape[1], device=x.device)  # float32 [t, parts, D]
        spread[rows, places] = parts.float()
        out = torch.zeros_like(x)
        out[start:end] = spread.sum(1)
        return out

    def _route(self, x: Tensor, first: int, route: Route) -> tuple[Tensor, Tensor]:
        if len(x):
            return route(x, first)
        return torch.empty(0, self._top_k, device=x.device), torch.empty(0, self._top_k, dtype=torch.int64, device=x.device)

    def _find_ranks(self, copies: Tensor) -> Tensor:
        """Return whether a rank has an expert of a token, [N, t]."""
        owners = torch.searchsorted(self._starts, copies, right=True)  # [t, k]
        return torch.zeros(self.size, len(copies), dtype=torch.bool, device=copies.device).scatter_(0, owners.t(), True)

    def _pack(self, x: Tensor, weights: Tensor, copies: Tensor) -> Tensor:
        """Return one row of bytes a token."""
        return torch.cat([part.contiguous().view(torch.uint8) for part in (weights, copies.int(), x)], 1)

    def _unpack(self, packed: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows [R, D] of the dtype of ``like``, their weights and their copies, both [R, k]."""
        half = self._head_bytes // 2
        weights, copies, x = (part.contiguous() for part in packed.tensor_split((half, self._head_bytes), 1))
        return x.view(like.dtype), weights.view(torch.float32), copies.view(torch.int32).long()
