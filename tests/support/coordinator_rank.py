"""A rank as a program of its own: does with its coordinator what standard input says, a line of JSON for each request and answer.

A request is ``[operation, arguments, options]``; bytes are ``{"bytes": <base64>}`` on both ways.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from typing import Any

import zspmd

TIMEOUT_S = 60.0


class Rank:
    """The operations that are not the coordinator's own."""

    def __init__(self, coordinator: zspmd.Coordinator) -> None:
        self.coordinator = coordinator

    def facts(self) -> dict[str, Any]:
        flags = {"is_master": self.coordinator.is_master, "is_local_master": self.coordinator.is_local_master}
        return {**dataclasses.asdict(self.coordinator.facts), **flags}

    def set(self, key: str, value: bytes) -> None:
        self.coordinator.store.set(key, value)

    def wait(self, key: str) -> None:
        self.coordinator.store.wait([key])

    def count_keys(self) -> int:
        return self.coordinator.store.count()

    def churn(self, rounds: int) -> None:
        """Do every operation so many times, with data of two parts in the first rounds."""
        for number in range(rounds):
            data = bytes(700_000 if number < 2 else 3)
            self.coordinator.broadcast(data, number % self.coordinator.world_size)
            self.coordinator.all_gather(data)
            self.coordinator.barrier()
            self.coordinator.local_barrier()

    def sum_with_torch(self) -> list[float]:
        """Sum the ranks over torch's default group and over a new one of the first two ranks, both made of a coordinator's store.

        Nothing here holds on to that coordinator.
        """
        import gc

        import torch
        import torch.distributed as dist

        rank, world_size = self.coordinator.rank, self.coordinator.world_size
        store = zspmd.Coordinator.from_env(timeout_s=TIMEOUT_S).torch_store()
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        del store
        gc.collect()
        try:
            pair = dist.new_group([0, 1])
            total, of_pair = torch.tensor([float(rank)]), torch.tensor([float(rank)])
            dist.all_reduce(total)
            if rank < 2:
                dist.all_reduce(of_pair, group=pair)
            return [total.item(), of_pair.item()]
        finally:
            dist.destroy_process_group()

    def from_env_again(self) -> list[bytes]:
        with zspmd.Coordinator.from_env(timeout_s=TIMEOUT_S) as another:
            self.coordinator.barrier()
            return another.all_gather(b"%d" % another.rank)

    def use_after_close(self) -> dict[str, str]:
        """Return the name of the error by which each operation of a closed coordinator is refused."""
        another = zspmd.Coordinator.from_env(timeout_s=TIMEOUT_S)
        another.close()
        another.close()
        calls: dict[str, list[Any]] = {"barrier": [], "local_barrier": [], "broadcast": [b""], "all_gather": [b""], "torch_store": []}
        errors = {}
        for name, arguments in calls.items():
            try:
                getattr(another, name)(*arguments)
            except zspmd.ZspmdError as error:
                errors[name] = type(error).__name__
        return errors


def main() -> None:
    with zspmd.Coordinator.from_env(timeout_s=TIMEOUT_S) as coordinator:
        rank = Rank(coordinator)
        for line in sys.stdin:
            name, arguments, options = json.loads(line, object_hook=from_json)
            try:
                answer = {"result": getattr(rank if hasattr(rank, name) else coordinator, name)(*arguments, **options)}
            except Exception as error:  # whatever it is, the test looks at it
                answer = {"error": type(error).__name__, "message": str(error), "absent": getattr(error, "absent", None)}
            print(json.dumps(answer, default=to_json), flush=True)


def to_json(value: Any) -> dict[str, str]:
    return {"bytes": base64.b64encode(value).decode()}


def from_json(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["bytes"]) if "bytes" in value else value


if __name__ == "__main__":
    main()
