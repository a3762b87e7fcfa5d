"""A side of ``zspmd-run bench step``: ``torch.distributed.rpc``, an asynchronous call to each of N workers."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch
import torch.distributed.rpc as rpc
from forking import forked

from zspmd.runtime.programs.bench.side_server import answers, serve, timed_us

TIMEOUT_S = 60.0


def acknowledge(payload: bytes) -> None:
    """Do nothing; called on the workers."""


def join(rank: int, num_ranks: int, directory: str) -> None:
    """Become a member; the driver is rank 0."""
    torch.set_num_threads(1)
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{directory}/rpc-store", rpc_timeout=TIMEOUT_S)
    rpc.init_rpc(  # type: ignore[no-untyped-call]
        f"rank{rank}", rank=rank, world_size=num_ranks + 1, rpc_backend_options=options
    )


def main(num_ranks: int, directory: str) -> None:
    """Serve as the driver."""
    os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    names = [f"rank{rank}" for rank in range(1, num_ranks + 1)]

    def follow(rank: int) -> None:
        join(rank, num_ranks, directory)
        while True:
            time.sleep(3600)

    def step(payload: bytes) -> None:
        for future in [rpc.rpc_async(name, acknowledge, (payload,)) for name in names]:
            future.wait()

    def take_turn(request: dict[str, Any]) -> dict[str, Any]:
        payload = bytes(request["payload"])
        return {"times_us": timed_us(lambda: step(payload), request["steps"], request["limit_s"])}

    with answers() as stream, forked(num_ranks, follow):
        join(0, num_ranks, directory)
        for _ in range(20):
            step(b"")
        serve(stream, take_turn)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # rpc.shutdown would wait for workers that are gone
