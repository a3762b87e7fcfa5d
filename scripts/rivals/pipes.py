"""A side of ``zspmd-run bench step``: a ``multiprocessing`` pipe to each of N processes, written and read in turn."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

from forking import forked

from zspmd.runtime.programs.bench.side_server import answers, serve, timed_us


def main(num_ranks: int) -> None:
    """Send a payload down every pipe, then wait for an answer from each."""
    pipes = [multiprocessing.Pipe() for _ in range(num_ranks)]

    def acknowledge(rank: int) -> None:
        connection = pipes[rank - 1][1]
        while True:
            connection.recv()
            connection.send(None)

    ends = [own for own, _ in pipes]

    def step(payload: bytes) -> None:
        for end in ends:
            end.send(payload)
        for end in ends:
            end.recv()

    def take_turn(request: dict[str, Any]) -> dict[str, Any]:
        payload = bytes(request["payload"])
        return {"times_us": timed_us(lambda: step(payload), request["steps"], request["limit_s"])}

    with answers() as stream, forked(num_ranks, acknowledge):
        serve(stream, take_turn)


if __name__ == "__main__":
    main(int(sys.argv[1]))
