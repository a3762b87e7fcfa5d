"""The driver's handle on the agents of all nodes of a launch: one ``NodeSupervisor`` each, and what is done to all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import LaunchError
from .agent_protocol import AgentGone, Start
from .nodes.agent_link import AgentLink, is_refused_for_load
from .run_directory import RunDirectory
from .supervisor import AgentLost, Event, NodeSupervisor

_NUM_TRIES = 4
_RETRY_S = 0.5


@dataclass(frozen=True)
class AllGone:
    """The agents of all nodes have ended, or are lost."""


NodeEvent = Event | AllGone
OnEvent = Callable[[NodeEvent, int], None]


class LaunchSupervisor:
    """Starts the ranks of every node under its agent and follows them to the end.

    Events come with the node rank; after the last node's ``AgentGone`` or ``AgentLost`` comes one ``AllGone``. Nodes are in the order
    of ``links`` until ``keep`` says which take part.

    Args:
        links: the ways to agents of other nodes, None for this one; one entry a node.
        lease_s: how long an agent of another node may be silent.
    """

    def __init__(self, on_event: OnEvent, links: Sequence[AgentLink | None] = (None,), *, lease_s: float = 15.0) -> None:
        self._on_event = on_event
        self._links = links
        self._lease_s = lease_s
        self.nodes = [self._supervisor(link) for link in links]
        self._gone: set[int] = set()

    def open(self) -> None:
        """Start the agent of this node, if it is one of them; raises as ``NodeSupervisor.open``."""
        for node in self.nodes:
            if node.is_local:
                node.open()

    async def attach(self, *, fanout: int, timeout_s: float) -> dict[int, LaunchError]:
        """Start the agents of the other nodes, ``fanout`` at a time, and return by node why one does not answer."""
        gate = asyncio.Semaphore(fanout)
        failures: dict[int, LaunchError] = {}

        async def attach(node_rank: int) -> None:
            async with gate:
                try:
                    await self._attach(node_rank, timeout_s)
                except LaunchError as error:
                    failures[node_rank] = error

        await asyncio.gather(*(attach(rank) for rank, node in enumerate(self.nodes) if not node.is_local))
        return failures

    async def keep(self, node_ranks: Sequence[int]) -> None:
        """Let the agents of all other nodes go, and number these from 0 in this order; before ``start``."""
        dropped = [node for rank, node in enumerate(self.nodes) if rank not in node_ranks]
        self.nodes = [self.nodes[rank] for rank in node_ranks]
        await asyncio.gather(*(node.stop(0.0, 0.0) for node in dropped))

    async def start(self, orders: Sequence[Start], run_directory: RunDirectory | None, timeout_s: float) -> None:
        """Start the ranks of every node by its order; returns when each rank has a process.

        Raises:
            LaunchError: a rank could not be started, within ``timeout_s`` or at all; what else was started is being ended.
        """
        starting = [
            asyncio.ensure_future(node.start(order, run_directory if node.is_local else None, timeout_s))
            for node, order in zip(self.nodes, orders)
        ]
        try:
            await asyncio.gather(*starting)
        except BaseException:
            for task in starting:
                task.cancel()
            await asyncio.gather(*starting, return_exceptions=True)
            raise

    async def dump_stacks(self, timeout_s: float) -> dict[int, str]:
        """Return by rank what each process is doing, as ``NodeSupervisor.dump_stacks``."""
        told = await asyncio.gather(*(node.dump_stacks(timeout_s) for node in self.nodes))
        return {rank: text for texts in told for rank, text in texts.items()}

    async def stop(self, grace_s: float, kill_s: float) -> None:
        """End every rank and agent, as ``NodeSupervisor.stop``; raises the first error once all have been tried."""
        ends = await asyncio.gather(*(node.stop(grace_s, kill_s) for node in self.nodes), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end

    def stop_nowait(self, grace_s: float, kill_s: float) -> None:
        """Ask for the same without waiting for it."""
        for node in self.nodes:
            node.stop_nowait(grace_s, kill_s)

    def signal_nowait(self, number: int) -> None:
        """Have a signal sent to every rank that runs."""
        for node in self.nodes:
            node.signal_nowait(number)

    def hold_nowait(self, is_held: bool) -> None:
        """Have what ranks print left in their pipes, so that they wait, or read again."""
        for node in self.nodes:
            node.hold_nowait(is_held)

    def kill_nowait(self) -> None:
        """End everything at once without waiting."""
        for node in self.nodes:
            node.kill_nowait()

    def _supervisor(self, link: AgentLink | None) -> NodeSupervisor:
        node = NodeSupervisor(lambda event: self._take(node, event), link, self._lease_s)
        return node

    async def _attach(self, node_rank: int, timeout_s: float) -> None:
        """Start an agent; once more, after a while, where sshd refuses one among many."""
        for attempt in range(_NUM_TRIES):
            node = self.nodes[node_rank]
            node.open()
            try:
                await node.wait_attached(timeout_s)
                return
            except LaunchError as error:
                if attempt + 1 == _NUM_TRIES or not is_refused_for_load(str(error)):
                    raise
            await node.stop(0.0, 0.0)
            self.nodes[node_rank] = self._supervisor(self._links[node_rank])
            await asyncio.sleep(_RETRY_S * (1 << attempt) * random.uniform(0.5, 1.5))

    def _take(self, node: NodeSupervisor, event: Event) -> None:
        if node not in self.nodes:  # let go, or tried again
            return
        node_rank = self.nodes.index(node)
        self._on_event(event, node_rank)
        if isinstance(event, (AgentGone, AgentLost)):
            self._gone.add(node_rank)
            if len(self._gone) == len(self.nodes):
                self._on_event(AllGone(), node_rank)
