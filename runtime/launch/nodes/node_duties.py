"""What an agent does for the driver of another node beside supervising ranks: facts, proofs, directory, port, relay, lease."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ....errors import ZspmdError
from ..agent_protocol import AgentRecord, Start
from ..checks.check_records import CheckMachine
from ..plan import is_foreign
from ..ports import ReservedPort, hold_port, reserve_port
from ..run_directory import RunDirectory
from .lease import Lease
from .node_facts import Examine
from .node_records import Attach, Listen, Listening, Ping, Pong, Prepare, Prepared, Reach, Reached, RelayLost

if TYPE_CHECKING:
    from .reach import Listener
    from .relay import Relay


class NodeDuties:
    """Answers the records of ``node_records``. Made before the loop runs; belongs to it from the first record on.

    What only several nodes need is imported when it is asked for: every launch waits for its agent.

    Args:
        send: to the driver.
        giver: where to leave the run directory for agent and guard; None where the driver makes it.
        on_driver_lost: called with the reason when the lease is over.
    """

    def __init__(self, send: Callable[[AgentRecord], None], giver: socket.socket | None, on_driver_lost: Callable[[str], None]) -> None:
        self._send = send
        self._giver = giver
        self._on_driver_lost = on_driver_lost
        self._lease: Lease | None = None
        self._listener: Listener | None = None
        self._port: ReservedPort | None = None
        self._relay: Relay | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def patience_s(self) -> float:
        """How long the driver may take nothing at the end before the rest is given up."""
        return 0.0 if self._lease is None else self._lease.lease_s

    def heard(self) -> None:
        """Note that the driver lives."""
        if self._lease is not None:
            self._lease.heard()

    def take(self, record: AgentRecord) -> bool:
        """Do what a record asks for; False for one that is none of this file's business."""
        if isinstance(record, Ping):
            self._send(Pong(record.number, time.monotonic_ns()))
        elif isinstance(record, Attach):
            self._attach(record.lease_s)
        elif isinstance(record, Examine):
            from .node_facts import gather_facts

            self._send(gather_facts(record))
        elif isinstance(record, CheckMachine):
            from ..checks.machine import check_machine

            self._send(check_machine())
        elif isinstance(record, Prepare):
            self._send(self._prepare(record))
        elif isinstance(record, Listen):
            self._go(self._listen(record))
        elif isinstance(record, Reach):
            self._go(self._reach(record))
        else:
            return False
        return True

    def starting(self, order: Start) -> None:
        """Do what comes before the first rank: the proofs are over, and the relay stands."""
        if self._listener is not None:
            self._listener.close()
        for relay in order.relay:
            from .relay import Relay

            self._relay = Relay(relay, lambda reason: self._send(RelayLost(reason)))
            self._relay.start()

    async def aclose(self) -> None:
        """Give everything back, after the ranks have ended."""
        if self._lease is not None:
            self._lease.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for part in (self._relay, self._listener, self._port, self._giver):
            if part is not None:
                part.close()

    def _attach(self, lease_s: float) -> None:
        def expire() -> None:
            self._on_driver_lost(f"nothing was heard of the driver for {lease_s:g} s, so everything here ends")

        self._lease = Lease(lease_s, lambda: None, expire)
        self._lease.start()

    def _prepare(self, order: Prepare) -> Prepared:
        try:
            if order.master_addr:
                held = hold_port(order.master_addr, order.master_port) if order.master_port else None
                self._port = held or reserve_port(order.launch_id, "master", order.master_addr)
            directory = RunDirectory.create(order.launch_id, order.node_rank)
            if self._giver is not None:
                directory.hand_over(self._giver)
                directory.let_go()
        except (ZspmdError, OSError) as error:
            return Prepared(error=str(error))
        return Prepared(str(directory.path), 0 if self._port is None else self._port.port)

    async def _listen(self, order: Listen) -> None:
        from .reach import Listener

        if self._listener is not None:
            self._listener.close()
        self._listener = Listener(order.address)
        try:
            self._send(Listening(await self._listener.open()))
        except OSError as error:
            self._send(Listening(error=str(error)))

    async def _reach(self, order: Reach) -> None:
        from .reach import reach

        async def one(target: str) -> str:
            address, _, port = target.rpartition(" ")
            return await reach(address, int(port), order.nonce, order.timeout_s)

        self._send(Reached(tuple(await asyncio.gather(*map(one, order.targets)))))

    def _go(self, answering: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(answering)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def with_own_environment(order: Start) -> Start:
    """Return the order with this node's variables under those that it sets, where it asks for that."""
    if not order.has_own_environment:
        return order
    own = {name: value for name, value in os.environ.items() if not is_foreign(name)}
    return replace(order, ranks=tuple(replace(rank, environment={**own, **rank.environment}) for rank in order.ranks))
