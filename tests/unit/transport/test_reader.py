"""Reading a socket from an event loop: no message may wait for an edge that was eaten."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest
import zmq

from zspmd.transport.reader import BUDGET, SocketReader

Context = zmq.Context[zmq.Socket[bytes]]
DEADLINE_S = 10.0
DEADLINE_MS = 10_000


class Inbox:
    """A reader over one end of a pair; ``messages`` and ``errors`` are what it got."""

    def __init__(self, context: Context, *, before: int = 0, transport: str = "ipc") -> None:
        self.ours, self.theirs = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        for socket in (self.ours, self.theirs):
            socket.set_hwm(0)
        endpoint = f"{transport}://@zspmd-test-reader-{os.getpid()}-{id(self)}"
        self.ours.bind(endpoint)
        self.theirs.connect(endpoint)
        for number in range(before):
            self.theirs.send(b"%d" % number)
        if before:
            assert self.ours.poll(DEADLINE_MS)
        self.messages: list[bytes] = []
        self.errors: list[Exception] = []
        self.largest_batch = self._batch = 0
        self._change = asyncio.Event()
        self.reader = SocketReader(asyncio.get_running_loop(), self.ours, self._read_one, self._on_error)

    def _read_one(self) -> None:
        message = self.ours.recv(zmq.NOBLOCK)
        if not self._batch:
            asyncio.get_running_loop().call_soon(self._end_batch)
        self._batch += 1
        self.largest_batch = max(self.largest_batch, self._batch)
        if message == b"bad":
            raise ValueError("a bad message")
        self.messages.append(message)
        self._change.set()

    def _end_batch(self) -> None:
        self._batch = 0

    def _on_error(self, error: Exception) -> None:
        self.errors.append(error)
        self._change.set()

    async def wait(self, condition: Callable[[], bool]) -> None:
        deadline = asyncio.get_running_loop().time() + DEADLINE_S
        while not condition():
            await asyncio.wait_for(self._change.wait(), deadline - asyncio.get_running_loop().time())
            self._change.clear()


@pytest.mark.parametrize("count", [1, BUDGET, 5 * BUDGET + 3])
async def test_messages_from_before_the_reader_are_read(context: Context, count: int) -> None:
    inbox = Inbox(context, before=count)
    await inbox.wait(lambda: len(inbox.messages) == count)
    assert inbox.messages == [b"%d" % number for number in range(count)]
    inbox.reader.close()


async def test_a_burst_above_the_budget_is_read_in_parts(context: Context) -> None:
    inbox = Inbox(context)
    for number in range(10 * BUDGET):
        inbox.theirs.send(b"%d" % number)
    await inbox.wait(lambda: len(inbox.messages) == 10 * BUDGET)
    assert inbox.messages == [b"%d" % number for number in range(10 * BUDGET)]
    assert inbox.largest_batch == BUDGET
    inbox.reader.close()


async def test_messages_one_at_a_time_are_read(context: Context) -> None:
    inbox = Inbox(context)
    for number in range(50):
        inbox.theirs.send(b"%d" % number)
        await inbox.wait(lambda: len(inbox.messages) == number + 1)  # noqa: B023  # the lambda ends with its iteration
    assert inbox.messages == [b"%d" % number for number in range(50)]
    inbox.reader.close()


async def test_a_message_whose_edge_a_send_has_eaten_is_found_by_poke(context: Context) -> None:
    inbox = Inbox(context)
    for number in range(200):
        inbox.theirs.send(b"%d" % number)
        assert inbox.ours.poll(DEADLINE_MS)
        inbox.ours.send(b"takes in the arrival")
        inbox.reader.poke()
        await inbox.wait(lambda: len(inbox.messages) == number + 1)  # noqa: B023  # as above
    inbox.reader.close()


async def test_what_read_one_raises_is_told_and_loses_nothing(context: Context) -> None:
    inbox = Inbox(context)
    for number in range(3 * BUDGET):
        inbox.theirs.send(b"bad" if number % 3 == 0 else b"%d" % number)
    await inbox.wait(lambda: len(inbox.messages) + len(inbox.errors) == 3 * BUDGET)
    assert inbox.messages == [b"%d" % number for number in range(3 * BUDGET) if number % 3]
    assert [str(error) for error in inbox.errors] == ["a bad message"] * BUDGET
    inbox.reader.close()


async def test_drain_reads_beyond_the_budget_at_once(context: Context) -> None:
    count = 3 * BUDGET
    inbox = Inbox(context, before=count, transport="inproc")  # where what was sent has arrived
    inbox.reader.drain()
    assert len(inbox.messages) == count
    inbox.reader.close()


async def test_a_closed_reader_reads_no_more(context: Context) -> None:
    inbox = Inbox(context, before=1)
    inbox.reader.close()
    inbox.reader.close()
    inbox.reader.poke()
    inbox.reader.drain()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(inbox._change.wait(), 0.01)
    assert inbox.messages == []
    assert inbox.ours.recv(zmq.NOBLOCK) == b"0"


async def test_a_reader_may_be_closed_by_its_own_callback(context: Context) -> None:
    inbox = Inbox(context, before=2)
    inbox.reader.close()
    seen: list[bytes] = []

    def read_and_close() -> None:
        seen.append(inbox.ours.recv(zmq.NOBLOCK))
        reader.close()

    reader = SocketReader(asyncio.get_running_loop(), inbox.ours, read_and_close, inbox._on_error)
    reader.drain()
    assert seen == [b"0"]
