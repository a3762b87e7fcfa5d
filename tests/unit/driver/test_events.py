"""The event log: streams that begin at the first event, end with the group, and cost nothing while nobody reads them."""

from __future__ import annotations

import asyncio

from zspmd.runtime.driver.events import MAX_EVENTS, EventLog, GroupEvent


async def collect(log: EventLog) -> list[GroupEvent]:
    return [event async for event in log.stream()]


async def test_every_stream_gets_every_event_whenever_it_begins() -> None:
    log = EventLog()
    early = asyncio.ensure_future(collect(log))
    log.emit("started", 0, "pid 7")
    log.emit("started", 1)
    await asyncio.wait([early], timeout=0)
    middle = asyncio.ensure_future(collect(log))
    log.emit("ready")
    log.emit("closed")
    late = await collect(log)
    assert [(event.kind, event.rank, event.detail) for event in late] == [
        ("started", 0, "pid 7"),
        ("started", 1, ""),
        ("ready", None, ""),
        ("closed", None, ""),
    ]
    assert await early == await middle == late


async def test_a_stream_that_is_left_leaves_nothing_behind() -> None:
    log = EventLog()
    reading = asyncio.ensure_future(collect(log))
    await asyncio.wait([reading], timeout=0)
    reading.cancel()
    await asyncio.wait([reading])
    log.emit("closed")
    assert [event.kind for event in await collect(log)] == ["closed"]


async def test_readers_that_give_up_are_forgotten_although_nothing_happens() -> None:
    log = EventLog()
    for _ in range(3):
        reading = asyncio.ensure_future(collect(log))
        await asyncio.wait([reading], timeout=0)
        reading.cancel()
        await asyncio.wait([reading])
    assert log.num_waiters == 0


async def test_a_slow_reader_is_told_how_much_it_missed() -> None:
    log = EventLog()
    stream = log.stream()
    for number in range(3):
        log.emit("replayed", number)
    assert (await stream.__anext__()).rank == 0
    for number in range(3, MAX_EVENTS + 10):
        log.emit("replayed", number)
    log.emit("closed")
    rest = [event async for event in stream]
    assert rest[0].kind == "skipped"
    assert rest[0].detail == f"10 events are not kept any more; the last {MAX_EVENTS} are"
    assert [event.rank for event in rest[1:-1]] == list(range(11, MAX_EVENTS + 10))
    assert len(rest) == 1 + MAX_EVENTS
