"""Ranks of a rival, forked from a process that has imported what they need; they end with it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from zspmd.process import die_with_parent


@contextlib.contextmanager
def forked(num_ranks: int, run: Callable[[int], None]) -> Iterator[None]:
    """Fork ranks 1 to ``num_ranks``, each of which does ``run`` and ends; this process is rank 0, and kills them at the end."""
    parent = os.getpid()
    pids = []
    for rank in range(1, num_ranks + 1):
        pid = os.fork()
        if pid == 0:
            try:
                die_with_parent(parent)
                run(rank)
            finally:
                os._exit(0)
        pids.append(pid)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
