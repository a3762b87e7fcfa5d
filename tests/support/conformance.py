"""What every communicator must do: cases, what each rank brings to them, and what must come out.

Each rank knows what all others bring, so it computes the expected result itself and says only what was wrong.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from zspmd.workers.communicators.communicator import Communicator

HALVES = (torch.float16, torch.bfloat16)
OPS = ("sum", "product", "min", "max", "mean")
DTYPES = ("float32", "float16", "bfloat16", "int64")
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3, 5), (2, 0, 3), (150_001,))  # the last is more than one slot of shared memory
LARGE_BYTES = 64 << 20


@dataclass(frozen=True)
class Case:
    """One collective: ``shape`` is that of a rank's part, ``layout`` dense, strided (every second element) or numpy."""

    operation: str
    dtype: str
    shape: tuple[int, ...]
    layout: str = "dense"
    op: str = "sum"

    def __str__(self) -> str:
        return f"{self.operation} {self.op} {self.dtype} {list(self.shape)} {self.layout}"


def inputs() -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Yield dtype, shape and layout; what is large only once for each dtype."""
    for dtype in DTYPES:
        for shape in SHAPES:
            for layout in ("dense", "strided") if shape != SHAPES[-1] else ("dense",):
                yield dtype, shape, layout


def small_cases() -> list[Case]:
    """Return every operation with every dtype, shape and layout that it may come in, of less than 2 MiB."""
    cases = [
        Case("all_reduce", dtype, shape, layout, op) for dtype, shape, layout in inputs() for op in OPS if op != "mean" or dtype != "int64"
    ]
    cases += [Case("reduce_scatter", dtype, shape, layout, op) for dtype, shape, layout in inputs() for op in ("sum", "max")]
    cases += [Case(operation, *rest) for operation in OPERATIONS if "reduce" not in operation for rest in inputs()]
    cases += [Case("all_reduce", dtype, (9,), "dense", "sum") for dtype in ("float64", "int8", "uint8", "int32")]
    cases += [Case(operation, dtype, (9,)) for operation in ("all_gather", "broadcast", "ring") for dtype in ("bool", "int16", "complex64")]
    cases += [Case(operation, dtype, (4, 3), "numpy") for operation in OPERATIONS for dtype in ("float32", "int64")]
    return cases


def large_cases() -> list[Case]:
    """Return each operation once, with tensors of 64 MiB."""
    return [Case(operation, "float32", (LARGE_BYTES // 4,)) for operation in ("all_reduce", "all_gather", "broadcast", "ring")] + [
        Case(operation, "bfloat16", (LARGE_BYTES // 4,))
        for operation in ("reduce_scatter", "all_to_all")  # two rows are 64 MiB
    ]


def share(rank: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return what a rank brings: small whole numbers, so that sums of them are exact in every dtype."""
    numel = math.prod(shape)
    cycle = ((torch.arange(7) + 3 * rank) % 7).to(getattr(torch, dtype))
    return cycle.repeat(-(-numel // 7))[:numel].reshape(shape)


def reduced(shares: list[torch.Tensor], op: str) -> torch.Tensor:
    """Return the reduction, computed without loss and rounded once."""
    stack = torch.stack(shares)
    wide = stack.float() if stack.dtype in HALVES else stack if stack.is_floating_point() else stack.long()
    results: dict[str, Callable[[], torch.Tensor]] = {
        "sum": lambda: wide.sum(0),
        "product": lambda: wide.prod(0),
        "min": lambda: wide.amin(0),
        "max": lambda: wide.amax(0),
        "mean": lambda: wide.mean(0),
    }
    return results[op]().to(stack.dtype)


def laid_out(tensor: torch.Tensor, layout: str) -> Any:
    """Return the same values in other memory."""
    if layout == "strided":
        return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
    return tensor.clone().numpy() if layout == "numpy" else tensor.clone()


def rows_between(sender: int, receiver: int) -> int:
    """Return how many rows go from one rank to another when they are uneven; some are none."""
    return (2 * sender + receiver) % 4


class Conformance:
    """Does cases on one communicator and says what was wrong with each."""

    def __init__(self, communicator: Communicator) -> None:
        self.communicator = communicator
        self.rank, self.size = communicator.rank, communicator.size

    def check(self, case: Case) -> str:
        """Do a case; "" if all is well."""
        try:
            result, expected = OPERATIONS[case.operation](self, case)
        except Exception as error:
            return f"{case} on rank {self.rank} raised {type(error).__name__}: {error}"
        if case.layout == "numpy" and not isinstance(result, np.ndarray):
            return f"{case} on rank {self.rank} returned a {type(result).__name__}"
        tensor = torch.from_numpy(result) if isinstance(result, np.ndarray) else result.cpu()
        if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
            return f"{case} on rank {self.rank} returned {tensor.dtype} {list(tensor.shape)}"
        if not self._is_equal(tensor, expected):
            return f"{case} on rank {self.rank} returned {tensor.flatten()[:8].tolist()}, not {expected.flatten()[:8].tolist()}"
        return ""

    def _is_equal(self, found: torch.Tensor, expected: torch.Tensor) -> bool:
        if self.communicator.device.type == "cpu" or found.dtype not in HALVES:
            return torch.equal(found, expected)
        return torch.allclose(found.double(), expected.double(), rtol=self.size * torch.finfo(found.dtype).eps, atol=0.0)

    def shares(self, case: Case) -> list[torch.Tensor]:
        return [share(rank, case.dtype, case.shape) for rank in range(self.size)]

    def own(self, tensor: torch.Tensor, case: Case) -> Any:
        value = laid_out(tensor, case.layout)
        return value if case.layout == "numpy" else value.to(self.communicator.device)

    def all_reduce(self, case: Case) -> tuple[Any, torch.Tensor]:
        shares = self.shares(case)
        value = self.own(shares[self.rank], case)
        assert self.communicator.all_reduce(value, case.op) is value
        return value, reduced(shares, case.op)

    def all_gather(self, case: Case) -> tuple[Any, torch.Tensor]:
        shares = self.shares(case)
        return self.communicator.all_gather(self.own(shares[self.rank], case)), torch.stack(shares)

    def reduce_scatter(self, case: Case) -> tuple[Any, torch.Tensor]:
        brought = [torch.stack([share(rank + row, case.dtype, case.shape) for row in range(self.size)]) for rank in range(self.size)]
        result = self.communicator.reduce_scatter(self.own(brought[self.rank], case), case.op)
        return result, reduced([rows[self.rank] for rows in brought], case.op)

    def broadcast(self, case: Case) -> tuple[Any, torch.Tensor]:
        shares, src = self.shares(case), self.size - 1
        value = self.own(shares[self.rank], case)
        assert self.communicator.broadcast(value, src) is value
        return value, shares[src]

    def all_to_all(self, case: Case) -> tuple[Any, torch.Tensor]:
        brought = [torch.stack([share(rank + row, case.dtype, case.shape) for row in range(self.size)]) for rank in range(self.size)]
        result = self.communicator.all_to_all(self.own(brought[self.rank], case))
        return result, torch.stack([rows[self.rank] for rows in brought])

    def uneven_all_to_all(self, case: Case) -> tuple[Any, torch.Tensor]:
        def pieces(sender: int) -> Iterator[torch.Tensor]:
            for receiver in range(self.size):
                num_rows = rows_between(sender, receiver)
                yield share(sender + receiver, case.dtype, (num_rows, *case.shape))

        result = self.communicator.all_to_all(
            self.own(torch.cat(list(pieces(self.rank))), case),
            send_counts=[rows_between(self.rank, receiver) for receiver in range(self.size)],
            receive_counts=[rows_between(sender, self.rank) for sender in range(self.size)],
        )
        return result, torch.cat([list(pieces(sender))[self.rank] for sender in range(self.size)])

    def ring(self, case: Case) -> tuple[Any, torch.Tensor]:
        """Each rank sends to the next; the first begins, and the others receive before they send."""
        communicator, shares = self.communicator, self.shares(case)
        value, received = self.own(shares[self.rank], case), self.own(torch.zeros_like(shares[0]), case)
        if self.size == 1:
            return value, shares[0]
        if communicator.is_first:
            communicator.send(value, communicator.next_rank)
            communicator.receive(received, communicator.previous_rank)
        else:
            assert communicator.receive(received, communicator.previous_rank) is received
            communicator.send(value, communicator.next_rank)
        return received, shares[communicator.previous_rank]

    def pairs(self, case: Case) -> tuple[Any, torch.Tensor]:
        """Even places and the next odd ones send to each other, in both directions; a last one without a partner does nothing."""
        communicator, shares, partner = self.communicator, self.shares(case), self.rank ^ 1
        value = self.own(shares[self.rank], case)
        if partner >= self.size:
            return value, shares[self.rank]
        received = self.own(torch.zeros_like(shares[0]), case)
        for _ in range(2):
            if self.rank < partner:
                communicator.send(value, partner)
                communicator.receive(received, partner)
            else:
                communicator.receive(received, partner)
                communicator.send(value, partner)
        return received, shares[partner]

    def letters(self, case: Case) -> tuple[Any, torch.Tensor]:
        """Each rank sends several messages to the next one, and changes them, before it takes any; in CPU memory whatever the device."""
        communicator, shares = self.communicator.cpu, [share.flatten()[:200] for share in self.shares(case)]
        messages = [shares[self.rank] + number for number in range(8)]
        if self.size > 1:
            for message in messages:
                value = laid_out(message, case.layout)
                communicator.send_nowait(value, communicator.next_rank)
                value[:] = 0
            for message in messages:
                assert communicator.receive(message, communicator.previous_rank) is message
        received = torch.stack(messages)
        return received.numpy() if case.layout == "numpy" else received, torch.stack(
            [shares[communicator.previous_rank] + number for number in range(8)]
        )


OPERATIONS: dict[str, Callable[[Conformance, Case], tuple[Any, torch.Tensor]]] = {
    "all_reduce": Conformance.all_reduce,
    "all_gather": Conformance.all_gather,
    "reduce_scatter": Conformance.reduce_scatter,
    "broadcast": Conformance.broadcast,
    "all_to_all": Conformance.all_to_all,
    "uneven_all_to_all": Conformance.uneven_all_to_all,
    "ring": Conformance.ring,
    "pairs": Conformance.pairs,
    "letters": Conformance.letters,
}


def mixed_cases(count: int, seed: int) -> list[Case]:
    """Return collectives of random kinds and sizes, the same on every rank; most are small, some go over several slots."""
    chance = random.Random(seed)
    cases = []
    for _ in range(count):
        operation, dtype = chance.choice(list(OPERATIONS)), chance.choice(DTYPES)
        op = chance.choice(OPS[:4] if dtype == "int64" else OPS)
        numel = chance.choice([0, 1, chance.randrange(100), chance.randrange(5_000), chance.randrange(80_000)])
        cases.append(Case(operation, dtype, (numel,), chance.choice(["dense", "strided"]), op))
    return cases


def rounding_errors(communicator: Communicator) -> list[float]:
    """Return the error of sums of random numbers, as a share of what is allowed, by dtype; and a hash of the bits as the last.

    The interface allows ``size * eps * sum(abs(x))``.
    """
    errors: list[float] = []
    bits = hashlib.sha256()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        shares = [torch.randn(70_001, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(communicator.size)]
        total = communicator.all_reduce(shares[communicator.rank].to(communicator.device).clone()).cpu()
        wide = torch.stack(shares).double()
        allowed = communicator.size * torch.finfo(dtype).eps * wide.abs().sum(0)
        errors.append(float(((total.double() - wide.sum(0)).abs() / allowed).max()))
        bits.update(total.view(torch.uint8).numpy().tobytes())
    return [*errors, float(int.from_bytes(bits.digest()[:6], "little"))]
