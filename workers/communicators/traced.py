"""Makes the collectives of a communicator spans on the timeline of a trace."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from ...transport.trace_spans import SpanTrace
from .communicator import Communicator

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send", "send_nowait", "receive", "barrier")


def trace_communicator(communicator: Communicator, axis: str, trace: SpanTrace) -> None:
    """Have each call take note of when it began and ended on this rank, waiting for peers included; on a GPU, when it was enqueued.

    The methods of this one object are replaced: a wrapper around it would cost a second pair of calls, and hide what its backend has of
    its own. A layer of a model makes several of these calls, so that this is most of what a trace costs: 1 us each.
    """
    for operation in OPERATIONS:
        setattr(communicator, operation, _traced(getattr(communicator, operation), trace.collective_head(operation, axis), trace))
    if communicator._create_cpu is not None:
        communicator._create_cpu = functools.partial(_create_traced, communicator._create_cpu, f"{axis}.cpu", trace)


def _create_traced(create: Callable[[], Communicator], axis: str, trace: SpanTrace) -> Communicator:
    communicator = create()
    trace_communicator(communicator, axis, trace)
    return communicator


def _traced(method: Callable[..., Any], head: int, trace: SpanTrace) -> Callable[..., Any]:
    begin, end, threads, get_thread = trace.begin, trace.end, trace.threads, threading.get_ident

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        value = args[0] if args else options.get("value")
        number = begin(head | threads.get(get_thread(), 0) << 8, trace.seq, getattr(value, "nbytes", 0))
        try:
            return method(*args, **options)
        finally:
            end(number)

    return call
