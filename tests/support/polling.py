"""Waiting for a condition that has no event, with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PERIOD_S = 0.002


async def wait_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Return once ``condition()`` is true; raises TimeoutError after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # what is waited for is often another process
        if time.monotonic() > deadline:
            raise TimeoutError(f"still not so after {timeout_s:g} s")
        await asyncio.sleep(PERIOD_S)


def block_until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """As ``wait_until``, where there is no event loop."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still not so after {timeout_s:g} s")
        time.sleep(PERIOD_S)
