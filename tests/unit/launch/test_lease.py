from __future__ import annotations

import asyncio
import math
import time

import pytest

from zspmd.runtime.launch.nodes.lease import Lease, PeerClock

LEASE_S = 0.2


class Watched:
    """A lease that counts its beats, and notes when it expired."""

    def __init__(self) -> None:
        self.num_beats = 0
        self.expired_at: list[float] = []
        self.expired = asyncio.Event()
        self.lease = Lease(LEASE_S, self._beat, self._expire)
        self.started_at = time.monotonic()
        self.lease.start()

    def _beat(self) -> None:
        self.num_beats += 1

    async def wait_expired(self) -> float:
        await self.expired.wait()
        return self.expired_at[0] - self.started_at

    def _expire(self) -> None:
        self.expired_at.append(time.monotonic())
        self.expired.set()


async def test_a_peer_that_says_nothing_is_lost_after_the_lease_and_told_once() -> None:
    watched = Watched()
    elapsed_s = await asyncio.wait_for(watched.wait_expired(), 10)
    await asyncio.sleep(LEASE_S)
    assert elapsed_s >= LEASE_S - 0.001
    assert len(watched.expired_at) == 1
    assert watched.num_beats == 10  # one at once, then each tenth of a lease as short as this


async def test_a_peer_that_is_heard_is_not_lost() -> None:
    watched = Watched()
    for _ in range(30):
        await asyncio.sleep(LEASE_S / 10)
        watched.lease.heard()
    assert watched.expired_at == []
    watched.lease.cancel()


async def test_a_pause_of_this_process_counts_for_one_beat() -> None:
    watched = Watched()
    await asyncio.sleep(LEASE_S / 4)
    time.sleep(3 * LEASE_S)  # noqa: ASYNC251  # what SIGSTOP or a suspended machine does
    await asyncio.sleep(0)
    assert watched.expired_at == []
    assert await asyncio.wait_for(watched.wait_expired(), 10) > 3.8 * LEASE_S  # two beats before, one for all of it, seven after


async def test_what_is_cancelled_does_not_expire() -> None:
    watched = Watched()
    watched.lease.cancel()
    watched.lease.cancel()
    await asyncio.sleep(2 * LEASE_S)
    assert watched.expired_at == []


def test_a_clock_that_was_not_read_may_be_anywhere() -> None:
    assert PeerClock().error_s == math.inf


@pytest.mark.parametrize("offset_ns", [0, 5_000_000_000, -7_000_000_000], ids=["same", "ahead", "behind"])
def test_times_of_a_peer_are_told_by_this_clock(offset_ns: int) -> None:
    clock = PeerClock()
    clock.answered(1_000_000, 1_300_000 + offset_ns, 2_000_000)  # 0.2 ms off: its way was slower than its way back
    assert clock.error_s == 0.0005
    assert abs(clock.here(9_000_000 + offset_ns) - 9_000_000) <= 500_000


def test_the_quickest_answer_counts() -> None:
    clock = PeerClock()
    clock.answered(0, 60, 100)
    clock.answered(1000, 1010, 1020)
    clock.answered(2000, 2900, 3000)
    assert clock.error_s == pytest.approx(10e-9, rel=0.1)
    assert clock.here(5000) == 5000


def test_an_old_answer_gives_way_to_a_slower_one_when_clocks_may_have_drifted_further() -> None:
    clock = PeerClock()
    clock.answered(0, 100_000, 200_000)
    hour_ns = 3_600_000_000_000
    drifted_ns = 50_000_000  # 14 ppm in an hour
    clock.answered(hour_ns, hour_ns + 1_000_000 + drifted_ns, hour_ns + 2_000_000)
    assert abs(clock.here(hour_ns + drifted_ns) - hour_ns) <= 1_000_000
    assert clock.error_s == pytest.approx(1e-3)
