"""Collectives over one mesh axis: the interface, and its one-rank form.

Every rank of the axis must make the same calls in the same order with equal shapes and dtypes. Operations take torch tensors or, on
the CPU, NumPy arrays; in-place ones return their argument.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, TypeVar

import numpy as np
import torch

from ...topology import AxisGroup

ArrayOrTensor = TypeVar("ArrayOrTensor", torch.Tensor, "np.ndarray[Any, np.dtype[Any]]")


class Communicator(ABC):
    """The collectives of one axis, seen from one rank."""

    def __init__(self, group: AxisGroup) -> None:
        self.group = group

    @property
    def rank(self) -> int:
        """This rank's place on the axis, from 0."""
        return self.group.index

    @property
    def size(self) -> int:
        return self.group.size

    def all_reduce(self, value: ArrayOrTensor) -> ArrayOrTensor:
        """Sum ``value`` over the axis, in place; all ranks get the same bits."""
        self._all_reduce(_as_tensor(value))
        return value

    def all_gather(self, value: ArrayOrTensor) -> ArrayOrTensor:
        """Return every rank's ``value``, stacked in rank order: [size, *value.shape]."""
        gathered = self._all_gather(_as_tensor(value, is_written=False))
        return gathered if isinstance(value, torch.Tensor) else gathered.numpy()

    def broadcast(self, value: ArrayOrTensor, source: int = 0) -> ArrayOrTensor:
        """Overwrite ``value`` with that of the axis' rank ``source``, in place."""
        self._broadcast(_as_tensor(value), source)
        return value

    @abstractmethod
    def barrier(self) -> None:
        """Wait until every rank of the axis is here."""

    @abstractmethod
    def close(self) -> None:
        """Release the group. No rank is waited for."""

    @abstractmethod
    def _all_reduce(self, tensor: torch.Tensor) -> None: ...

    @abstractmethod
    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _broadcast(self, tensor: torch.Tensor, source: int) -> None: ...


class SoloCommunicator(Communicator):
    """An axis of one rank: nothing to exchange."""

    def barrier(self) -> None:
        """Return at once."""

    def close(self) -> None:
        """Nothing to release."""

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        """The sum of one is itself."""

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def _broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """The only rank is the source."""


def _as_tensor(value: Any, *, is_written: bool = True) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a collective got a {type(value).__name__}; give it a torch tensor or a NumPy array")
    if not value.flags.writeable:
        if not is_written:
            return torch.from_numpy(value.copy())
        raise ValueError("a collective got a read-only array, such as a step's input; give it a copy or the result of arithmetic")
    return torch.from_numpy(value)
