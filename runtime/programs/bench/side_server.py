"""The other half of ``side_process``: what a side's program calls to be told its turns."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

Turn = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def answers() -> Iterator[TextIO]:
    """Yield the stream for answers: standard output as it was, which from now on leads to standard error for whatever prints."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with stream:
        yield stream


def answer(stream: TextIO, value: dict[str, Any]) -> None:
    """Write one line."""
    stream.write(json.dumps(value) + "\n")
    stream.flush()


def serve(stream: TextIO, take_turn: Turn, facts: dict[str, Any] | None = None) -> None:
    """Say that this side is ready, then take every turn that it is told, to the end of standard input."""
    answer(stream, facts or {})
    for line in sys.stdin:
        answer(stream, take_turn(json.loads(line)))


def timed_us(function: Callable[[], object], count: int, limit_s: float) -> list[float]:
    """Return the microseconds of each of ``count`` calls, or of as many as fit into ``limit_s``, at least one."""
    times = list[float]()
    end = time.perf_counter_ns() + int(limit_s * 1e9)
    while len(times) < count:
        began = time.perf_counter_ns()
        function()
        ended = time.perf_counter_ns()
        times.append((ended - began) / 1000)
        if ended > end:
            break
    return times
