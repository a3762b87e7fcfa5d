"""The collectives of an axis of one rank: nothing to exchange, on any device."""

from __future__ import annotations

import torch

from .arguments import check_reduction
from .communicator import ArrayOrTensor, Communicator


class SoloCommunicator(Communicator):
    """An axis of one rank. What ``all_gather`` returns shares memory with what it got."""

    def all_reduce(self, value: ArrayOrTensor, op: str = "sum") -> ArrayOrTensor:
        """Return ``value``: the sum of one is itself."""
        check_reduction(op, self._take(value).dtype)
        return value

    def all_gather(self, value: ArrayOrTensor) -> ArrayOrTensor:
        """Return ``value`` as [1, *value.shape], without a copy."""
        tensor = self._take(value, is_written=False)
        return tensor[None] if isinstance(value, torch.Tensor) else value[None]

    def _all_reduce(self, tensor: torch.Tensor, op: str) -> None:
        """Nothing to add."""

    def _all_gather(self, rows: torch.Tensor, own: torch.Tensor) -> None:
        rows[0].copy_(own)

    def _reduce_scatter(self, reduced: torch.Tensor, tensor: torch.Tensor, op: str) -> None:
        reduced.copy_(tensor[0])

    def _broadcast(self, data: torch.Tensor, src: int) -> None:
        """The only rank is the source."""

    def _all_to_all(self, received: torch.Tensor, data: torch.Tensor, receive_sizes: list[int], send_sizes: list[int]) -> None:
        received.copy_(data)

    def _send(self, data: torch.Tensor, dst: int) -> None:
        raise AssertionError("check_place lets no other rank through")

    def _receive(self, data: torch.Tensor, src: int) -> None:
        raise AssertionError("check_place lets no other rank through")

    def _barrier(self) -> None:
        """Nobody to wait for."""

    def _close(self) -> None:
        """Nothing to release."""
