"""Workers that tests launch by name."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from support.memory import peak_bytes, reset_peak
from support.polling import block_until

import zspmd

GATE_S = 60.0


class Echo(zspmd.Worker):
    """Answers what it got, with its rank."""

    def setup(self, *, scale: float = 1.0) -> None:
        self.scale = scale
        self.num_steps = 0

    def step(self, inputs: Any) -> Any:
        self.num_steps += 1
        return {"rank": self.ctx.rank, "inputs": inputs}

    @zspmd.rpc
    def info(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "rank": self.ctx.rank, "num_steps": self.num_steps, "scale": self.scale}

    @zspmd.rpc
    def add(self, a: int, b: int = 0) -> int:
        return a + b

    @zspmd.rpc
    def fail(self, message: str) -> None:
        raise ValueError(message)

    def hidden(self) -> str:
        return "never called"


class Diary(zspmd.Worker):
    """Writes down every step that it gets."""

    def setup(self) -> None:
        self.entries: list[Any] = []

    def step(self, inputs: Any) -> Any:
        self.entries.append(inputs)
        return inputs

    @zspmd.rpc
    def diary(self) -> list[Any]:
        return self.entries


class Firsts(zspmd.Worker):
    """Writes down the first element of every array that it gets."""

    def setup(self) -> None:
        self.seen: list[int] = []

    def step(self, inputs: Any) -> Any:
        self.seen.append(int(inputs[0]))
        return None

    @zspmd.rpc
    def firsts(self) -> list[int]:
        return self.seen


class Memory(zspmd.Worker):
    """Says by how much its memory had grown at the most."""

    def setup(self) -> None:
        self.before = reset_peak()
        self.array: Any = None

    def step(self, inputs: Any) -> Any:
        return {"sum": int(inputs["x"].sum()), "peak_growth": self.peak_growth()}

    @zspmd.rpc
    def prepare(self, size: int) -> None:
        self.array = np.arange(size // 8, dtype=np.int64)
        self.before = reset_peak()

    @zspmd.rpc
    def large(self) -> Any:
        return {"x": self.array, "sum": int(self.array.sum())}

    @zspmd.rpc
    def peak_growth(self) -> int:
        return peak_bytes() - self.before


class Reducer(zspmd.Worker):
    """Sums over the tp axis."""

    def step(self, inputs: Any) -> Any:
        return self.ctx.mesh["tp"].all_reduce(inputs["x"] * (self.ctx.rank + 1.0))


class Troubled(zspmd.Worker):
    """Fails as its arguments and steps ask for."""

    def setup(self, *, raise_on: int = -1, exit_on: int = -1, stall_on: int = -1) -> None:
        print(f"rank {self.ctx.rank} sets up", flush=True)
        if self.ctx.rank == raise_on:
            raise RuntimeError("set-up goes wrong here")
        if self.ctx.rank == exit_on:
            sys.exit(7)
        if self.ctx.rank == stall_on:
            time.sleep(3600)

    def step(self, inputs: Any) -> Any:
        action = inputs.get(self.ctx.rank)
        if action == "raise":
            raise RuntimeError("a step goes wrong here")
        if action == "exit":
            print("about to leave", flush=True)
            os._exit(7)
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "sleep":
            time.sleep(3600)
        if inputs.get("reduce"):
            self.ctx.mesh["tp"].all_reduce(np.ones(1))
        return action


class TorchReducer(zspmd.Worker):
    """Sums torch tensors on this rank's own device."""

    def step(self, inputs: Any) -> Any:
        import torch

        ones = torch.full((inputs["size"],), self.ctx.rank + 1.0, device=self.ctx.device)
        return float(self.ctx.mesh["tp"].all_reduce(ones).sum())


class Gate(zspmd.Worker):
    """Stays in a step or call until a file appears, on the ranks that its input names."""

    def step(self, inputs: Any) -> Any:
        return self.wait(inputs["path"], inputs["ranks"])

    @zspmd.rpc
    def wait(self, path: str, ranks: list[int]) -> int:
        if self.ctx.rank in ranks:
            block_until(lambda: os.path.exists(path), GATE_S)
        return self.ctx.rank

    @zspmd.rpc
    def fail_on(self, ranks: list[int]) -> int:
        if self.ctx.rank in ranks:
            raise LookupError(f"rank {self.ctx.rank} fails")
        return self.ctx.rank


class Chatty(zspmd.Worker):
    """Prints and reports progress in its set-up, and prints in each step."""

    def setup(self, *, lines: int) -> None:
        for number in range(lines):
            print(f"line {number}", flush=True)
        self.ctx.report_progress(1, 2, "weights")
        self.ctx.report_progress(2, 2, "weights")

    def step(self, inputs: Any) -> Any:
        print(inputs, file=sys.stderr, flush=True)
        return None

    def teardown(self) -> None:
        print("tears down", flush=True)


class Types(zspmd.Worker):
    """Says what arrived, and answers with twice the ``x`` that it got and with itself in bfloat16."""

    def setup(self, *, weight: Any = None) -> None:
        self.weight = weight

    def step(self, inputs: Any) -> Any:
        import torch

        x = inputs["x"]
        return {
            "type": f"{type(x).__module__}.{type(x).__qualname__}",
            "dtype": str(x.dtype),
            "twice": x + x,
            "bfloat16": torch.ones(3).bfloat16(),
            "weight": self.weight,
        }


class StoreUser(zspmd.Worker):
    """Uses the coordinator's store from several threads at once."""

    @zspmd.rpc
    def exchange(self, num_threads: int) -> list[bytes]:
        """Each thread sets its key and waits for that of the next rank's thread."""
        store, rank, world_size = self.ctx.store, self.ctx.rank, self.ctx.world_size

        def swap(thread: int) -> bytes:
            store.set(f"{rank}/{thread}", b"%d/%d" % (rank, thread))
            return store.get(f"{(rank + 1) % world_size}/{thread}")

        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(swap, range(num_threads)))

    @zspmd.rpc
    def count(self, times: int) -> list[int]:
        return [self.ctx.store.add("counter", 1) for _ in range(times)]

    @zspmd.rpc
    def absent(self) -> list[str]:
        try:
            self.ctx.store.wait(["nobody sets this"], timeout_s=0.05)
        except TimeoutError as error:
            return [str(error)]
        return []


class Stuck(zspmd.Worker):
    """Enters a collective in each step, after it has made a file of its pid; the ranks in ``absent`` wait for their end instead."""

    def setup(self, *, directory: str, absent: list[int]) -> None:
        self.directory, self.absent = directory, absent
        self.ctx.mesh["world"].barrier()

    def step(self, inputs: Any) -> Any:
        (Path(self.directory) / f"rank{self.ctx.rank}").write_text(str(os.getpid()))
        if self.ctx.rank in self.absent:
            signal.pause()
        return self.ctx.mesh["world"].all_reduce(np.ones(4))


class Reuser(zspmd.Worker):
    """Answers with one large buffer that each step overwrites, and with as many arrays as it is asked for."""

    def setup(self) -> None:
        import numpy as np

        self.buffer = np.zeros(1 << 21)

    def step(self, inputs: Any) -> Any:
        import numpy as np

        if "num_arrays" in inputs:
            return [np.zeros(2000)] * inputs["num_arrays"]
        self.buffer[:] = inputs["fill"]
        return self.buffer


class Starved(zspmd.Worker):
    """Runs out of what its step names by rank: descriptors, memory, or room for the memory of its collectives."""

    def step(self, inputs: Any) -> Any:
        action = inputs.get(self.ctx.rank)
        if action == "files":
            while True:
                os.dup(0)
        if action == "memory":
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))  # room for what else starts, not for 2 GiB
            return np.ones(1 << 28)
        if action == "cgroup":
            Path(inputs["procs"]).write_text(str(os.getpid()))
            return np.ones(1 << 28)
        if action == "shared memory":  # a file of more than 64 KiB is refused; so is one in memory
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        return self.ctx.mesh["tp"].all_reduce(np.ones(1))


class Meeting(zspmd.Worker):
    """Uses the launch's store when it is told to, and not before."""

    def step(self, inputs: Any) -> Any:
        return None

    @zspmd.rpc
    def meet(self) -> None:
        self.ctx.coordinator.barrier()


class Chatter(zspmd.Worker):
    """Prints 256 KiB in each step."""

    def step(self, inputs: Any) -> Any:
        for _ in range(256):
            print("x" * 1023, flush=True)


class Counting(zspmd.Worker):
    """Answers each step with its rank, how many it had done before, and what it got."""

    def setup(self) -> None:
        self.num_done = 0

    def step(self, inputs: Any) -> Any:
        self.num_done += 1
        return [self.ctx.rank, self.num_done - 1, inputs]
