"""A side of ``zspmd-run bench step``: gloo's ``broadcast_object_list`` from a driver to N ranks, and ``gather_object`` back."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from forking import forked

from zspmd.runtime.programs.bench.side_server import answers, serve, timed_us

TIMEOUT = timedelta(seconds=300)  # of a rank that waits for its next turn


def join(rank: int, num_ranks: int, directory: str) -> None:
    """Become a member of the process group, of which the driver is rank 0."""
    torch.set_num_threads(1)
    store = dist.FileStore(  # type: ignore[attr-defined]
        os.path.join(directory, "gloo-store"), num_ranks + 1
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks + 1, timeout=TIMEOUT)


def main(num_ranks: int, directory: str) -> None:
    """Serve as the driver."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    def follow(rank: int) -> None:
        join(rank, num_ranks, directory)
        while True:
            dist.broadcast_object_list([None], src=0)
            dist.gather_object(None, None, dst=0)

    def step(payload: bytes) -> None:
        dist.broadcast_object_list([payload], src=0)
        dist.gather_object(None, [None] * (num_ranks + 1), dst=0)

    def take_turn(request: dict[str, Any]) -> dict[str, Any]:
        payload = bytes(request["payload"])
        return {"times_us": timed_us(lambda: step(payload), request["steps"], request["limit_s"])}

    with answers() as stream, forked(num_ranks, follow):
        join(0, num_ranks, directory)
        step(b"")
        serve(stream, take_turn)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # a process group whose ranks are gone would wait for them
