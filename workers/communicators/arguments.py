"""What collectives accept: the checks of ``Communicator``, each with the value and what to do about it in its message."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...topology import AxisGroup

REDUCE_OPS = ("sum", "product", "min", "max", "mean")
# those that every backend takes, so that a program may change backends
REDUCIBLE_DTYPES: tuple[torch.dtype, ...] = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)
HALF_DTYPES = (torch.float16, torch.bfloat16)


def as_tensor(value: Any, *, is_written: bool) -> torch.Tensor:
    """Return ``value`` as a tensor over the same memory, outside autograd.

    Raises:
        TypeError: neither a tensor nor an array.
        ValueError: a read-only array that is to be written to.
    """
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    if not isinstance(value, np.ndarray):
        raise TypeError(f"a collective got a {type(value).__name__}; give it a torch tensor or a NumPy array")
    if value.flags.writeable:
        return torch.from_numpy(value)
    if is_written:
        raise ValueError("a collective got a read-only array, such as a step's input; give it a copy or the result of arithmetic")
    return torch.from_numpy(value.copy())


def as_dense(tensor: torch.Tensor, *, is_written: bool) -> torch.Tensor:
    """Return a contiguous tensor of the same values: this one, or a copy of one that has other strides or is lazily negated or conjugated.

    Raises:
        ValueError: one that is to be written to has elements that share memory.
    """
    if tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj():
        return tensor
    if is_written and any(stride == 0 and length > 1 for stride, length in zip(tensor.stride(), tensor.shape)):
        raise ValueError(f"a collective got an expanded tensor of strides {list(tensor.stride())} to write to; give it a clone")
    return tensor.resolve_conj().resolve_neg().contiguous()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor's memory as uint8 [num_bytes]."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a contiguous tensor of one element may have any stride, which view() keeps
    return flat.view(torch.uint8)


def row_bytes(tensor: torch.Tensor) -> int:
    """Return the size of one index of the first dimension."""
    return tensor.shape[1:].numel() * tensor.element_size()


def check_device(tensor: torch.Tensor, device: torch.device) -> None:
    """Raise ValueError unless the tensor is dense memory on ``device``."""
    if tensor.device != device:
        raise ValueError(f"a collective on {device} got a tensor on {tensor.device}; move it first, or use the communicator's cpu")
    if tensor.layout is not torch.strided:
        raise ValueError(f"a collective got a tensor of layout {tensor.layout}; give it a dense one")


def check_reduction(op: str, dtype: torch.dtype) -> None:
    """Raise ValueError for an unknown operation, and TypeError for a dtype that it does not take."""
    if op not in REDUCE_OPS:
        raise ValueError(f"op is {op!r}; choose one of {', '.join(REDUCE_OPS)}")
    dtypes = REDUCIBLE_DTYPES
    if op == "mean" and not dtype.is_floating_point:
        dtypes = tuple(known for known in dtypes if known.is_floating_point)
    if dtype not in dtypes:
        names = ", ".join(str(known).removeprefix("torch.") for known in dtypes)
        raise TypeError(f"a {op} over the ranks got {str(dtype).removeprefix('torch.')}; it takes {names}; convert it first")


def check_place(name: str, place: int, group: AxisGroup, *, is_other: bool = False) -> None:
    """Raise ValueError unless ``place`` is one of the group and, if ``is_other``, not this rank's own."""
    if type(place) is not int or not 0 <= place < group.size:
        raise ValueError(f"{name} is {place!r}; it must be a place on axis {group.axis}, from 0 to {group.size - 1}")
    if is_other and place == group.index:
        raise ValueError(f"{name} is {place}, this rank's own place on axis {group.axis}; it must be another")


def check_rows(tensor: torch.Tensor, size: int) -> None:
    """Raise ValueError unless the first dimension has one row for each rank."""
    if tensor.ndim < 1 or tensor.shape[0] != size:
        raise ValueError(f"reduce_scatter got the shape {list(tensor.shape)}; its first dimension must be the axis' size {size}")


def check_splits(
    tensor: torch.Tensor, send_counts: Sequence[int] | None, receive_counts: Sequence[int] | None, group: AxisGroup
) -> tuple[list[int], list[int]]:
    """Return the rows to send and to receive, by place; ``Communicator.all_to_all`` says what they may be.

    Raises:
        ValueError: they do not fit the tensor, the group or each other.
    """
    if tensor.ndim < 1:
        raise ValueError("all_to_all got a tensor without dimensions; its rows are split along the first")
    if (send_counts is None) != (receive_counts is None):
        raise ValueError("all_to_all got only one of send_counts and receive_counts; give both or neither: they are not exchanged")
    num_rows = tensor.shape[0]
    if send_counts is None or receive_counts is None:
        if num_rows % group.size:
            raise ValueError(f"all_to_all got {num_rows} rows, which {group.size} ranks cannot share evenly; give send_counts")
        return [num_rows // group.size] * group.size, [num_rows // group.size] * group.size
    to_send = _counts("send_counts", send_counts, group.size)
    to_receive = _counts("receive_counts", receive_counts, group.size)
    if sum(to_send) != num_rows:
        raise ValueError(f"send_counts sum to {sum(to_send)}, but the tensor has {num_rows} rows")
    if to_send[group.index] != to_receive[group.index]:
        raise ValueError(
            f"rank {group.index} of axis {group.axis} sends itself {to_send[group.index]} rows and is to receive "
            f"{to_receive[group.index]}; the two counts must be equal"
        )
    return to_send, to_receive


def _counts(name: str, counts: Sequence[int], size: int) -> list[int]:
    numbers = [operator.index(count) for count in counts]
    if len(numbers) != size or any(number < 0 for number in numbers):
        raise ValueError(f"{name} is {numbers}; it must have {size} numbers of at least 0, one for each rank")
    return numbers
