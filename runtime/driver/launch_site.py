"""What every launch owns, whatever its ranks run: plan, agents on its nodes, run directory, master port, and a door where it has TCP."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import zmq

from ...errors import NodeLostError
from ...transport.door import Door
from ...transport.reader import SocketReader
from ...transport.records import Bootstrap
from ...transport.schema import pack_record
from ..launch.agent_protocol import RelayOrder, Start
from ..launch.launch_record import LaunchRecord
from ..launch.launch_supervisor import LaunchSupervisor, OnEvent
from ..launch.nodes.nodes_request import NodesRequest
from ..launch.plan import LaunchPlan, plan_local
from ..launch.ports import hold_port, reserve_port
from ..launch.resources import shortages_named
from ..launch.run_directory import RunDirectory
from ..launch.supervisor import AgentLost
from .routes import Routes

if TYPE_CHECKING:
    from ..launch.dial.dial_nodes import DialNodes
    from ..launch.dial.dial_place import DialPlace

LOCAL_ADDRESS = "127.0.0.1"


class LaunchSite:
    """The machines of one launch. ``prepare`` makes the plan, ``open_door`` comes with the sockets, ``start`` starts the ranks; then
    ``stop`` and ``close``, which work half-way too.

    Args:
        request: what the launch is to be.
        dial: the place of this process among those that call each other; None where agents are started from here.
        call_s: how long those may take to call.
        on_notice: gets a kind, "refused" or "late", and a text, about nodes that call in.
        on_node_signal: called with node rank and number when the process of such a node gets a signal.

    Attributes:
        address: of the driver on TCP; None where all ranks are on this node.
    """

    plan: LaunchPlan
    run_directory: RunDirectory
    routes: Routes

    def __init__(
        self,
        request: NodesRequest,
        on_event: OnEvent,
        *,
        lease_s: float,
        dial: DialPlace | None,
        call_s: float,
        on_notice: Callable[[str, str], None],
        on_node_signal: Callable[[int, int], None],
    ) -> None:
        self._request = request
        self._on_event = on_event
        self._lease_s = lease_s
        self._dial = dial
        self._call_s = call_s
        self._on_notice = on_notice
        self._on_node_signal = on_node_signal
        self._callers: DialNodes | None = None
        self.token = secrets.token_bytes(32)
        self.address: str | None = None
        self.door: Door | None = None
        self.supervisor: LaunchSupervisor | None = None
        self.cleanups = contextlib.ExitStack()  # the last first, and each of them whatever another raises

    async def prepare(self) -> LaunchPlan:
        """Return the plan; the agents wait for their orders.

        Raises:
            EndpointInUseError: a live launch has this launch id, or the port that was asked for is taken.
            PreflightError: nodes cannot be used.
            TopologyError: too few slots, or devices.
            ResourceError: the system has too few descriptors, threads, memory or disk.
        """
        if self._dial is not None:
            await self._wait_callers(self._dial)
        self.plan = self._plan_here() if self._request.hosts is None else await self._plan_nodes()
        return self.plan

    def open_door(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        on_event: Callable[[str, int | None, str], None],
        on_error: Callable[[Exception], None],
        *,
        is_all_tcp: bool = False,
        relay_mode: str = "off",
    ) -> None:
        """Say by which way each rank comes, and have somebody at the door before there is one; within a host there is none."""
        self.routes = Routes(self.plan, self.address, is_all_tcp=is_all_tcp, relay_mode=relay_mode)
        if self.routes.has_tcp:
            self.door = Door(context, self.plan.world_size, on_event, self.routes.relayed)
            self.cleanups.callback(self.door.close)
            reader = SocketReader(asyncio.get_running_loop(), self.door.socket, self.door.answer_one, on_error)
            self.cleanups.callback(reader.close)

    def endpoints(self, name: str) -> list[str]:
        """Return what the driver's end ``name`` is to bind."""
        return self.routes.endpoints(self.run_directory, name)

    def secret(self, rank: int, control_endpoints: Sequence[str]) -> bytes:
        """Return what opens the door for one rank, and for it alone where there are keys."""
        endpoint = self.routes.endpoint(rank, control_endpoints)
        bootstrap = Bootstrap(launch_id=self.plan.launch_id, control_endpoint=endpoint, token=self.token)
        if self.door is not None and self.routes.is_tcp(rank):
            keys = self.door.rank_keys(rank)
            bootstrap = replace(bootstrap, public_key=keys.public, secret_key=keys.secret, server_key=keys.server)
        return pack_record(bootstrap)

    def relay(self, node_rank: int, step_endpoints: Sequence[str]) -> RelayOrder | None:
        """Return what the agent of a node is to do for its ranks beside watching them, if anything."""
        if self.door is None or node_rank not in self.routes.relayed:
            return None
        keys = self.door.node_keys(node_rank)
        return RelayOrder(
            upstream=self.routes.upstream(step_endpoints),
            endpoint=self.routes.relay_endpoint(node_rank),
            public_key=keys.public,
            secret_key=keys.secret,
            server_key=keys.server,
        )

    async def start(self, build_order: Callable[[int], Start], timeout_s: float, *, is_script: bool, log_dir: str | None) -> str | None:
        """Start the ranks of every node by ``build_order(node_rank)``; returns why ``zspmd-run ps`` will not know of them, if it will not.

        Raises:
            LaunchError: a rank could not be started, within ``timeout_s`` or at all.
        """
        assert self.supervisor is not None, "prepare comes first"
        orders = [build_order(node_rank) for node_rank in range(len(self.plan.nodes))]
        await self.supervisor.start(orders, self.run_directory, timeout_s)
        hosts = self._request.hosts if self._callers is None else None
        record = LaunchRecord.of_this_process(
            self.plan, self.supervisor.nodes, is_script=is_script, log_dir=log_dir, hosts=hosts, config=self._request.config
        )
        return record.write(self.run_directory.path)

    def node_name(self, node_rank: int) -> str:
        """Return what to call a node where there are several; "" where there is one."""
        nodes = self.plan.nodes
        return f"node {node_rank} ({nodes[node_rank].name})" if len(nodes) > 1 else ""

    def node_lost(self, node_rank: int, event: AgentLost) -> NodeLostError:
        """Return the error of a node, or of its agent, that is gone."""
        name = self.node_name(node_rank)
        if not name:
            return NodeLostError(f"the agent that supervises the ranks is gone: {event.reason}", ranks=event.ranks)
        listed = ", ".join(map(str, event.ranks)) or "none that runs"
        node = self.plan.nodes[node_rank]
        what = f"{name} is lost, with ranks {listed}: {event.reason}"
        return NodeLostError(what, host="" if node.is_local else node.name, ranks=event.ranks)

    async def dump_stacks(self, timeout_s: float) -> dict[int, str]:
        """Return by rank what each process is doing: the kernel's word, and the Python stacks of its threads."""
        return {} if self.supervisor is None else await self.supervisor.dump_stacks(timeout_s)

    async def stop(self, grace_s: float, kill_s: float) -> None:
        """End the ranks, as ``LaunchSupervisor.stop`` does."""
        if self.supervisor is not None:
            await self.supervisor.stop(grace_s, kill_s)

    def kill_nowait(self) -> None:
        """Have every rank ended at once; ``stop`` waits for it."""
        if self.supervisor is not None:
            self.supervisor.kill_nowait()

    def close(self) -> None:
        """Give directory, port, door and what else is among the cleanups back; the processes must have ended."""
        self.cleanups.close()

    async def leave_callers(self, exit_code: int) -> None:
        """Have the processes of nodes that called in end with this code; the last of all."""
        if self._callers is not None:
            await self._callers.aclose(exit_code)

    async def _wait_callers(self, place: DialPlace) -> None:
        from ..launch.dial.dial_nodes import DialNodes

        self._callers = DialNodes(
            place,
            on_signal=self._on_node_signal,
            on_refused=lambda text: self._on_notice("refused", text),
            on_late=lambda text: self._on_notice("late", text),
        )
        await self._callers.open(self._call_s)
        self._request = self._callers.complete(self._request)

    def _plan_here(self) -> LaunchPlan:
        request = self._request
        self.supervisor = LaunchSupervisor(self._on_event)
        self.supervisor.open()  # before there is a run directory: from now on somebody removes it, whatever becomes of the driver
        address = request.master_addr or LOCAL_ADDRESS
        with shortages_named():
            self._make_run_directory()
            port = hold_port(address, request.master_port) if request.master_port else reserve_port(request.launch_id, "master", address)
            self.cleanups.callback(port.close)
        self.address = request.bind
        return plan_local(
            launch_id=request.launch_id,
            world_size=request.world_size or 1,
            master_addr=address,
            master_port=port.port,
            run_directory=str(self.run_directory.path),
            devices=request.devices,
        )

    async def _plan_nodes(self) -> LaunchPlan:
        from ..launch.nodes.assembly import Assembly  # what a launch on one node need not wait for

        assembly = Assembly(self._request, self._on_event, lease_s=self._lease_s, cleanups=self.cleanups)
        self.supervisor = await assembly.open()
        with shortages_named():
            self._make_run_directory()
        plan = await assembly.plan(self.run_directory.path)
        self.address = assembly.driver_address
        return plan

    def _make_run_directory(self) -> None:
        self.run_directory = RunDirectory.create(self._request.launch_id)
        self.cleanups.callback(self.run_directory.remove)
