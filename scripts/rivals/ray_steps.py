"""A side of ``zspmd-run bench step``: Ray, as a compiled graph over N actors, or as plain calls of them.

A compiled graph's actors spin while they wait, so that it is made for each of its turns and taken down after it: its time is not measured.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # or it makes a token in the home directory
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.dag import InputNode, MultiOutputNode

from zspmd.runtime.programs.bench.side_server import answers, serve, timed_us

WARM_UP = 30
STORE_BYTES = 128 << 20
GET_TIMEOUT_S = 30.0


class Acknowledger:
    """Answers each step with nothing."""

    def step(self, payload: bytes) -> bytes:
        """Do nothing."""
        return b""


@contextmanager
def compiled_step(actors: list[Any]) -> Iterator[Callable[[bytes], None]]:
    """Yield a step as a compiled graph."""
    with InputNode() as payload_node:
        graph = MultiOutputNode([actor.step.bind(payload_node) for actor in actors]).experimental_compile()

    def step(payload: bytes) -> None:
        ray.get(graph.execute(payload), timeout=GET_TIMEOUT_S)

    try:
        yield step
    finally:
        graph.teardown()


@contextmanager
def called_step(actors: list[Any]) -> Iterator[Callable[[bytes], None]]:
    """Yield a step as calls of all actors."""

    def step(payload: bytes) -> None:
        ray.get([actor.step.remote(payload) for actor in actors], timeout=GET_TIMEOUT_S)

    yield step


def main(num_ranks: int, directory: str) -> None:
    """Start Ray on this machine alone, and take turns."""
    with answers() as stream:
        ray.init(
            address="local",
            num_cpus=num_ranks,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=STORE_BYTES,
            _temp_dir=os.path.join(directory, "ray"),
        )
        try:
            actors = [ray.remote(num_cpus=1)(Acknowledger).remote() for _ in range(num_ranks)]
            ray.get([actor.step.remote(b"") for actor in actors], timeout=GET_TIMEOUT_S)

            def take_turn(request: dict[str, Any]) -> dict[str, Any]:
                payload = bytes(request["payload"])
                make = compiled_step if request["variant"] == "graph" else called_step
                with make(actors) as step:
                    for _ in range(min(WARM_UP, request["steps"])):
                        step(payload)
                    return {"times_us": timed_us(lambda: step(payload), request["steps"], request["limit_s"])}

            serve(stream, take_turn)
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
