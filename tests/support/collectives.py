"""A worker that puts the communicators of its mesh to the test, and what they must refuse."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from support.conformance import Case, Conformance, large_cases, mixed_cases, rounding_errors, small_cases

import zspmd
from zspmd.workers.communicators.communicator import Communicator

# What is refused, by name: what a rank tries, and what the message must have.
REFUSALS: dict[str, tuple[Callable[[Communicator], object], type[Exception], str]] = {
    "list": (lambda c: c.all_reduce([1.0]), TypeError, "a collective got a list; give it a torch tensor or a NumPy array"),  # type: ignore[type-var]
    "read-only array": (lambda c: c.all_reduce(np.frombuffer(bytes(8))), ValueError, "a collective got a read-only array"),
    "expanded tensor": (lambda c: c.broadcast(torch.ones(1).expand(4)), ValueError, "got an expanded tensor of strides [0] to write to"),
    "unknown op": (lambda c: c.all_reduce(torch.ones(1), "avg"), ValueError, "op is 'avg'; choose one of sum, product, min, max, mean"),
    "mean of integers": (
        lambda c: c.all_reduce(torch.ones(1).int(), "mean"),
        TypeError,
        "mean over the ranks got int32; it takes float16, ",
    ),
    "dtype": (lambda c: c.all_reduce(torch.ones(1).bool()), TypeError, "a sum over the ranks got bool; it takes float16, bfloat16, "),
    "other device": (lambda c: c.all_reduce(torch.ones(1, device="meta")), ValueError, "on cpu got a tensor on meta; move it first"),
    "src outside": (
        lambda c: c.broadcast(torch.ones(1), c.size),
        ValueError,
        "src is {size}; it must be a place on axis tp, from 0 to {last}",
    ),
    "src negative": (lambda c: c.broadcast(torch.ones(1), -1), ValueError, "src is -1; it must be a place"),
    "src no number": (lambda c: c.broadcast(torch.ones(1), True), ValueError, "src is True; it must be a place"),
    "dst outside": (lambda c: c.send(torch.ones(1), 99), ValueError, "dst is 99; it must be a place on axis tp, from 0 to {last}"),
    "dst itself": (lambda c: c.send(torch.ones(1), c.rank), ValueError, "this rank's own place on axis tp; it must be another"),
    "src itself": (lambda c: c.receive(torch.ones(1), c.rank), ValueError, "this rank's own place on axis tp; it must be another"),
    "rows": (
        lambda c: c.reduce_scatter(torch.ones(7, 2)),
        ValueError,
        "got the shape [7, 2]; its first dimension must be the axis' size {size}",
    ),
    "uneven rows": (lambda c: c.all_to_all(torch.ones(7)), ValueError, "all_to_all got 7 rows, which {size} ranks cannot share evenly"),
    "no rows": (lambda c: c.all_to_all(torch.tensor(1)), ValueError, "all_to_all got a tensor without dimensions"),
    "one kind of counts": (lambda c: c.all_to_all(torch.ones(2), send_counts=[1, 1]), ValueError, "only one of send_counts and receive_"),
    "number of counts": (
        lambda c: c.all_to_all(torch.ones(2), send_counts=[2], receive_counts=[2]),
        ValueError,
        "send_counts is [2]; it must have {size} numbers of at least 0",
    ),
    "negative counts": (
        lambda c: c.all_to_all(torch.ones(0), send_counts=[1, -1] + [0] * (c.size - 2), receive_counts=[0] * c.size),
        ValueError,
        "send_counts is [1, -1",
    ),
    "sum of counts": (
        lambda c: c.all_to_all(torch.ones(9), send_counts=[1] * c.size, receive_counts=[1] * c.size),
        ValueError,
        "send_counts sum to {size}, but the tensor has 9 rows",
    ),
    "counts for itself": (
        lambda c: c.all_to_all(torch.ones(c.size), send_counts=[1] * c.size, receive_counts=[2] * c.size),
        ValueError,
        "sends itself 1 rows and is to receive 2; the two counts must be equal",
    ),
}


class Collectives(zspmd.Worker):
    """Puts the communicators of its mesh to the test."""

    def setup(self) -> None:
        torch.set_num_threads(1)

    @zspmd.rpc
    def conform(self, kind: str, count: int = 0, seed: int = 0) -> list[str]:
        """Do the cases of a kind on the tp axis and return what was wrong."""
        makers: dict[str, Callable[[], list[Case]]] = {
            "small": small_cases,
            "large": large_cases,
            "mixed": lambda: mixed_cases(count, seed),
        }
        conformance = Conformance(self.ctx.mesh["tp"])
        cases = [case for case in makers[kind]() if self.ctx.device == "cpu" or case.layout != "numpy"]
        assert cases
        return [wrong for wrong in map(conformance.check, cases) if wrong]

    @zspmd.rpc
    def rounding(self) -> list[float]:
        return rounding_errors(self.ctx.mesh["tp"])

    @zspmd.rpc
    def refusals(self) -> list[str]:
        """Try everything that is refused, on the first rank alone, then sum; returns what was not refused as it should be."""
        communicator = self.ctx.mesh["tp"]
        wrong = []
        for name, (attempt, kind, words) in REFUSALS.items() if communicator.is_first else ():
            try:
                attempt(communicator)
                wrong.append(f"{name} was taken")
            except (TypeError, ValueError) as error:
                if type(error) is not kind or words.format(size=communicator.size, last=communicator.size - 1) not in str(error):
                    wrong.append(f"{name}: {error!r}")
        if float(communicator.all_reduce(torch.ones(1))) != communicator.size:
            wrong.append("the ranks are out of step afterwards")
        return wrong

    @zspmd.rpc
    def lazy(self) -> list[str]:
        """Gather and overwrite tensors that torch has conjugated or negated without touching their memory; 1 - 2i and -2 are right."""
        c = self.ctx.mesh["tp"]
        conjugated = torch.tensor([1 + 2j]).conj()
        overwritten = conjugated.conj().resolve_conj().conj() if c.is_first else torch.zeros(1, dtype=torch.complex64).conj()
        negated = torch.tensor([1 + 2j, 1 + 2j]).conj().imag
        return [str(c.all_gather(x).flatten().tolist()) for x in (conjugated, negated)] + [str(c.broadcast(overwritten).tolist())]

    @zspmd.rpc
    def backend(self, axis: str) -> str:
        return type(self.ctx.mesh[axis]).__name__

    @zspmd.rpc
    def places(self, axis: str) -> list[Any]:
        """Return what the communicator of an axis says of its ranks, and their sum."""
        c = self.ctx.mesh[axis]
        total = int(c.all_reduce(torch.tensor(self.ctx.rank)))
        return [list(c.ranks), c.rank, c.size, c.is_first, c.is_last, c.next_rank, c.previous_rank, c.cpu is c, total]

    @zspmd.rpc
    def cpu_side(self, axis: str) -> list[Any]:
        """Return the class of the communicator for CPU tensors and a sum over it."""
        cpu = self.ctx.mesh[axis].cpu
        assert self.ctx.mesh[axis].cpu is cpu
        return [type(cpu).__name__, float(cpu.all_reduce(torch.tensor(cpu.rank + 1.0)))]

    @zspmd.rpc
    def captured(self, num_replays: int) -> list[Any]:
        """Sum a one over the tp axis as often as a CUDA graph is replayed; returns the first element, and whether all are as it."""
        value = torch.ones(1024, device=self.ctx.device)
        communicator = self.ctx.mesh["tp"]
        communicator.all_reduce(value.clone())
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            communicator.all_reduce(value)
        for _ in range(num_replays):
            graph.replay()
        torch.cuda.synchronize()
        return [float(value[0]), bool((value == value[0]).all())]

    @zspmd.rpc
    def barrier(self, path: str, late_rank: int) -> bool:
        """Whether, after a barrier, the file is there that the late rank made before it."""
        if self.ctx.rank == late_rank:
            time.sleep(0.05)  # what a barrier without effect would not wait for
            with open(path, "w"):
                pass
        self.ctx.mesh["world"].barrier()
        return os.path.exists(path)

    @zspmd.rpc
    def pair_alone(self) -> bool:
        """Ranks 0 and 1 exchange a message of several parts while the others are not even in a collective."""
        communicator = self.ctx.mesh["tp"]
        value = torch.full((300_000,), float(communicator.rank))
        if communicator.rank == 0:
            communicator.send(value, 1)
        if communicator.rank == 1:
            communicator.receive(value, 0)
        return bool((value == (0 if communicator.rank < 2 else communicator.rank)).all())

    @zspmd.rpc
    def close_and_use(self) -> str:
        communicator = self.ctx.mesh["tp"]
        communicator.close()
        communicator.close()
        try:
            communicator.barrier()
        except zspmd.ClosedError as error:
            return str(error)
        return "still open"
