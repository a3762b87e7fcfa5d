"""The moments of a start."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator

from zspmd.runtime.driver.events import GroupEvent
from zspmd.runtime.engine.start_times import Moment, StartTimes, describe_moments


async def events(*kinds: tuple[str, int | None]) -> AsyncIterator[GroupEvent]:
    for kind, rank in kinds:
        yield GroupEvent(kind, rank)


async def test_moments_come_in_order_and_end_with_the_first_token() -> None:
    times = StartTimes()
    times.mark("engine starts")
    times.progressed(0, 5, 10, "weights")
    times.progressed(0, 10, 10, "weights")
    await times.add_events(events(("serving", None), ("started", 0), ("silent", 0), ("ready", None), ("started", 1)))
    times.first_token()
    times.progressed(1, 10, 10, "weights")  # of ranks that replace others
    told = [(moment.what, moment.rank) for moment in times.moments()]
    assert told == [
        ("engine starts", None),
        ("weights read", 0),
        ("agent serves", None),
        ("forked", 0),
        ("ranks ready", None),
        ("first token", None),
    ]
    assert times.is_whole


def test_they_count_from_the_beginning_of_the_process() -> None:
    code = (
        "import time; time.sleep(0.3); from zspmd.runtime.engine.start_times import process_began_at as at; print(time.monotonic() - at())"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert 0.29 <= float(done.stdout) <= time.monotonic() - began + 0.02  # the kernel tells it to a hundredth


def test_ranks_share_a_line_and_the_last_one_counts() -> None:
    moments = [Moment("engine starts", 0.25), Moment("forked", 1.0, 1), Moment("forked", 1.5, 0), Moment("weights read", 1.75, 0)]
    assert describe_moments(moments) == [
        "   0.25 s    +0.25  engine starts",
        "   1.50 s    +1.25  2 ranks, the last 0: forked",
        "   1.75 s    +0.25  rank 0: weights read",
    ]
