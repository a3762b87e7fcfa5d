"""What a model asks of its tensor-parallel group; ``workers`` hands in the real one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Communicator(Protocol):
    """Collectives over one mesh axis. Every rank of the axis enters the same calls in the same order with the same shapes."""

    @property
    def rank(self) -> int:
        """This rank's place on the axis, from 0."""

    @property
    def size(self) -> int:
        """How many ranks the axis has; with 1 no call communicates."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` (contiguous) over the ranks in place and return it; bit for bit the same on each of them."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors [size, *tensor.shape] in rank order."""
