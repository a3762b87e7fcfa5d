"""Collectives over one mesh axis: the interface that every backend fulfils.

The public methods check what they are given and hand dense memory to a few hooks (``_all_reduce`` and so on), which are all that a
backend writes. So wrong input gets the same error on every backend, before anything is exchanged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ...errors import ClosedError
from ...topology import AxisGroup
from .arguments import as_bytes, as_dense, as_tensor, check_device, check_place, check_reduction, check_rows, check_splits, row_bytes

if TYPE_CHECKING:
    from types import TracebackType

    import numpy as np

    from ..coordinator import Coordinator

ArrayOrTensor = TypeVar("ArrayOrTensor", torch.Tensor, "np.ndarray[Any, np.dtype[Any]]")
_Self = TypeVar("_Self", bound="Communicator")


class Communicator(ABC):
    """The collectives of one axis, seen from one rank.

    Every rank of the axis makes the same calls in the same order with equal shapes and dtypes (``send`` and ``receive``: the two ranks
    concerned). Ranks are named by their place on the axis, from 0; ``ranks[place]`` is the world rank. Operations take torch tensors on
    the communicator's device of any strides or, on the CPU, NumPy arrays; autograd does not see them.

    Reductions take float16, bfloat16, float32, float64, int8, uint8, int32 and int64; other operations take any dtype. All ranks get
    the same bits. Integers are exact, modulo the width of their dtype. Floating sums are within ``size * eps(dtype) * sum(abs(x))`` of
    the exact one; on CPUs float16 and bfloat16 are reduced in float32 and rounded once, NCCL may round at each rank. Which NaN or zero
    a minimum or maximum of several returns is the backend's choice.

    Errors: TypeError and ValueError for wrong input, with nothing exchanged; ClosedError after ``close``; PeerLostError if a rank
    ended or is late, after which the communicator is good for nothing but ``close``. Used by one thread at a time.
    """

    def __init__(self, group: AxisGroup, *, device: str = "cpu") -> None:
        self.group = group
        self.device = torch.device(device)
        self._is_closed = False
        self._cpu: Communicator | None = None
        self._create_cpu: Callable[[], Communicator] | None = None

    @staticmethod
    def create(
        coordinator: Coordinator, backend: str = "auto", *, device: str | None = None, timeout_s: float | None = None
    ) -> Communicator:
        """Return a communicator over all ranks of the launch; every rank must call this, with the same backend.

        Args:
            backend: "shm" (CPUs of one node), "gloo" (CPUs), "nccl" or "nccl-raw" (GPUs), a vendor's, or "auto".
            device: "cpu" or "cuda:N"; None takes the coordinator's.
            timeout_s: how long a rank waits for another, here and in each collective; None takes the coordinator's.

        Raises:
            ConfigError, TopologyError: no such backend, or it does not fit the device or the node.
            CoordinatorTimeoutError: another rank did not come within ``timeout_s``; names it.
        """
        from .registry import create_for_launch

        return create_for_launch(coordinator, backend, device=device, timeout_s=timeout_s)

    @property
    def rank(self) -> int:
        """This rank's place on the axis, from 0."""
        return self.group.index

    @property
    def size(self) -> int:
        """How many ranks the axis has."""
        return self.group.size

    @property
    def ranks(self) -> tuple[int, ...]:
        """The world ranks, by place."""
        return self.group.ranks

    @property
    def is_first(self) -> bool:
        return self.group.is_first

    @property
    def is_last(self) -> bool:
        return self.group.is_last

    @property
    def next_rank(self) -> int:
        """The next place on the axis, wrapping round: what ``send`` and ``receive`` take. ``group.next_rank`` is the world rank."""
        return (self.rank + 1) % self.size

    @property
    def previous_rank(self) -> int:
        """The place before, wrapping round."""
        return (self.rank - 1) % self.size

    @property
    def cpu(self) -> Communicator:
        """The communicator of the same ranks for CPU tensors: this one if it is for such, else gloo's.

        That of a GPU axis is made when it is first asked for, which all its ranks must do at the same point of the program.
        """
        if self._create_cpu is None:
            return self
        if self._cpu is None:
            self._check_open()
            self._cpu = self._create_cpu()
        return self._cpu

    def all_reduce(self, value: ArrayOrTensor, op: str = "sum") -> ArrayOrTensor:
        """Reduce ``value`` over the axis, in place, and return it.

        Args:
            op: "sum", "product", "min", "max", or "mean" for floating dtypes.
        """
        tensor = self._take(value)
        check_reduction(op, tensor.dtype)
        dense = as_dense(tensor, is_written=True)
        if dense.numel():
            self._all_reduce(dense, op)
            if dense is not tensor:
                tensor.copy_(dense)
        return value

    def all_gather(self, value: ArrayOrTensor) -> ArrayOrTensor:
        """Return every rank's ``value``, stacked in rank order: [size, *value.shape]."""
        dense = as_dense(self._take(value, is_written=False), is_written=False)
        gathered = dense.new_empty(self.size, *dense.shape)
        if dense.numel():
            self._all_gather(as_bytes(gathered).view(self.size, -1), as_bytes(dense))
        return _like(value, gathered)

    def reduce_scatter(self, value: ArrayOrTensor, op: str = "sum") -> ArrayOrTensor:
        """Reduce ``value`` [size, *shape] over the axis and return the row [*shape] of this rank's place."""
        tensor = self._take(value, is_written=False)
        check_reduction(op, tensor.dtype)
        check_rows(tensor, self.size)
        reduced = tensor.new_empty(tensor.shape[1:])
        if reduced.numel():
            self._reduce_scatter(reduced, as_dense(tensor, is_written=False), op)
        return _like(value, reduced)

    def broadcast(self, value: ArrayOrTensor, src: int = 0) -> ArrayOrTensor:
        """Overwrite ``value`` with that of place ``src``, in place, and return it."""
        tensor = self._take(value)
        check_place("src", src, self.group)
        dense = as_dense(tensor, is_written=True)
        if dense.numel():
            self._broadcast(as_bytes(dense), src)
            if dense is not tensor:
                tensor.copy_(dense)
        return value

    def all_to_all(
        self, value: ArrayOrTensor, *, send_counts: Sequence[int] | None = None, receive_counts: Sequence[int] | None = None
    ) -> ArrayOrTensor:
        """Give each rank its rows of ``value`` and return the rows for this one, [sum(receive_counts), *value.shape[1:]].

        Args:
            send_counts: rows of ``value`` for each place, in order; their sum is its length. None splits it evenly.
            receive_counts: rows that come from each place, as that one knows them: counts are not exchanged. Goes with ``send_counts``.
        """
        tensor = self._take(value, is_written=False)
        to_send, to_receive = check_splits(tensor, send_counts, receive_counts, self.group)
        received = tensor.new_empty(sum(to_receive), *tensor.shape[1:])
        size_bytes = row_bytes(tensor)
        if size_bytes:
            sizes = [[rows * size_bytes for rows in counts] for counts in (to_receive, to_send)]
            self._all_to_all(as_bytes(received), as_bytes(as_dense(tensor, is_written=False)), *sizes)
        return _like(value, received)

    def send(self, value: ArrayOrTensor, dst: int) -> None:
        """Send ``value`` to place ``dst``, which receives it with the same shape and dtype; no other rank takes part.

        A send may wait until it is received. Ranks that all send at once, as in a ring, take turns or use ``all_to_all``.
        """
        dense = as_dense(self._take(value, is_written=False), is_written=False)
        check_place("dst", dst, self.group, is_other=True)
        if dense.numel():
            self._send(as_bytes(dense), dst)

    def send_nowait(self, value: ArrayOrTensor, dst: int) -> None:
        """Send ``value`` as ``send`` does, without waiting for place ``dst`` to receive it; it may change once this has returned.

        64 such messages of 384 KiB altogether may be on their way from this rank to one other; one more may wait until an earlier one is
        received, and so may one to another place than the message before it.
        CPU tensors only: on a GPU a send waits on the stream, with all that is enqueued behind it; take the communicator's
        ``cpu``.

        Raises:
            ValueError: this communicator is for tensors on a GPU.
        """
        if self.device.type != "cpu":
            raise ValueError(f"send_nowait is for CPU tensors, and this communicator for those on {self.device}; use its cpu")
        dense = as_dense(self._take(value, is_written=False), is_written=False)
        check_place("dst", dst, self.group, is_other=True)
        if dense.numel():
            self._send_nowait(as_bytes(dense), dst)

    def receive(self, value: ArrayOrTensor, src: int) -> ArrayOrTensor:
        """Overwrite ``value`` with what place ``src`` sends, in place, and return it."""
        tensor = self._take(value)
        check_place("src", src, self.group, is_other=True)
        dense = as_dense(tensor, is_written=True)
        if dense.numel():
            self._receive(as_bytes(dense), src)
            if dense is not tensor:
                tensor.copy_(dense)
        return value

    def barrier(self) -> None:
        """Wait until every rank of the axis is here."""
        self._check_open()
        self._barrier()

    def close(self) -> None:
        """Release the group, once its collectives are done; a second close does nothing. A program may end without it."""
        self._release(self._close)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._release(self._close if error is None else self._abort)

    def _take(self, value: ArrayOrTensor, *, is_written: bool = True) -> torch.Tensor:
        self._check_open()
        tensor = as_tensor(value, is_written=is_written)
        check_device(tensor, self.device)
        return tensor

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError(f"the communicator of axis {self.group.axis} has been closed; make a new one")

    def _release(self, release: Callable[[], None]) -> None:
        if not self._is_closed:
            self._is_closed = True
            if self._cpu is not None:
                self._cpu.close()
            release()

    # What a backend writes. Tensors are contiguous, not empty and on its device; those of "bytes" are uint8 [num_bytes].

    @abstractmethod
    def _all_reduce(self, tensor: torch.Tensor, op: str) -> None:
        """Reduce ``tensor`` in place."""

    @abstractmethod
    def _all_gather(self, rows: torch.Tensor, own: torch.Tensor) -> None:
        """Fill the bytes ``rows`` [size, num_bytes] with every rank's ``own`` [num_bytes]."""

    @abstractmethod
    def _reduce_scatter(self, reduced: torch.Tensor, tensor: torch.Tensor, op: str) -> None:
        """Fill ``reduced`` [*shape] with the reduction of this rank's row of ``tensor`` [size, *shape]."""

    @abstractmethod
    def _broadcast(self, data: torch.Tensor, src: int) -> None:
        """Overwrite the bytes ``data`` with those of ``src``."""

    @abstractmethod
    def _all_to_all(self, received: torch.Tensor, data: torch.Tensor, receive_sizes: list[int], send_sizes: list[int]) -> None:
        """Send consecutive pieces of the bytes ``data`` to each place and receive such into ``received``; any of them may be empty."""

    @abstractmethod
    def _send(self, data: torch.Tensor, dst: int) -> None:
        """Send the bytes ``data``; they may change once this has returned."""

    def _send_nowait(self, data: torch.Tensor, dst: int) -> None:
        """Send the bytes ``data`` without waiting for ``dst``; written by backends for CPUs whose ``_send`` waits."""
        self._send(data, dst)

    @abstractmethod
    def _receive(self, data: torch.Tensor, src: int) -> None:
        """Overwrite the bytes ``data`` with what ``src`` sends."""

    @abstractmethod
    def _barrier(self) -> None:
        """Wait for every rank."""

    @abstractmethod
    def _close(self) -> None:
        """Release what the backend holds; called once."""

    def _abort(self) -> None:
        """Release it at once, where collectives may never be done; called instead of ``_close``."""
        self._close()


def _like(value: ArrayOrTensor, result: torch.Tensor) -> ArrayOrTensor:
    return result if isinstance(value, torch.Tensor) else result.numpy()
