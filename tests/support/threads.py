"""A communicator over the threads of one process, so that tensor-parallel arithmetic is tested without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
TIMEOUT_S = 30.0


class ThreadCommunicator:
    """One rank among threads that share ``slots`` and ``barrier``; fulfils ``zspmd.models.communicator.Communicator``."""

    device = torch.device("cpu")

    def __init__(self, rank: int, slots: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(slots)
        self._slots = slots
        self._barrier = barrier

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks in rank order, in place."""
        return tensor.copy_(self.all_gather(tensor).sum(0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the ranks' tensors [size, ...] in rank order."""
        self._slots[self.rank] = tensor
        self._barrier.wait(TIMEOUT_S)
        shapes = {slot.shape for slot in self._slots if slot is not None}
        assert shapes == {tensor.shape}, f"ranks entered a collective with different shapes: {shapes}"
        gathered = torch.stack([slot for slot in self._slots if slot is not None])
        self._barrier.wait(TIMEOUT_S)  # nobody may change a tensor that another is still reading
        return gathered

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Sum ``tensor`` [size, ...] over the ranks and return this one's row."""
        return self.all_gather(tensor).sum(0)[self.rank]

    def all_to_all(
        self, tensor: Tensor, *, send_counts: Sequence[int] | None = None, receive_counts: Sequence[int] | None = None
    ) -> Tensor:
        """Return the rows that the ranks have for this one; what they say they send must be what it expects."""
        counts = [len(tensor) // self.size] * self.size if send_counts is None else list(send_counts)
        assert sum(counts) == len(tensor)
        every = self.all_gather(torch.tensor(counts))
        assert receive_counts is None or every[:, self.rank].tolist() == list(receive_counts)
        longest = int(every.sum(1).max())
        gathered = self.all_gather(torch.cat((tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:]))))
        return torch.cat([rows[: sum(sent)].split(sent)[self.rank] for rows, sent in zip(gathered, every.tolist(), strict=True)])


def run_ranks(size: int, function: Callable[[ThreadCommunicator], T]) -> list[T]:
    """Call ``function(communicator)`` on ``size`` threads at once and return the results in rank order.

    The first rank to raise breaks the barrier for the others, and its exception is raised here.
    """
    barrier = threading.Barrier(size)
    slots: list[Tensor | None] = [None] * size

    def run(rank: int) -> T:
        try:
            return function(ThreadCommunicator(rank, slots, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        wait(futures)
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]
