"""What the launch of a script owns while it lives: run directory, ports, the store of its coordinator, and the supervisor of its ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import zmq

from ...errors import NodeLostError, ProtocolError
from ...transport.control_sockets import ControlServer
from ..launch.agent_protocol import Start
from ..launch.command.options import ScriptOptions
from ..launch.launch_supervisor import LaunchSupervisor, OnEvent
from ..launch.nodes.nodes_request import NodesRequest
from ..launch.orders import node_order
from ..launch.plan import LaunchPlan, plan_local
from ..launch.resources import check_resources, shortages_named
from ..launch.supervisor import AgentLost
from .control import ControlHub, RankRecord
from .launch_site import LaunchSite

START_S = 120.0
KILL_S = 2.0


class ScriptProcesses:
    """The ranks of a script on all nodes. ``prepare`` makes the plan and all but the ranks, ``start`` those; ``stop``, then ``close``.

    Args:
        log_policy: as in ``Start``.
        on_trouble: gets a line of text where a connection misbehaves.
        on_node_signal: called with node rank and number when the process of a node that called in gets a signal.
    """

    def __init__(
        self,
        options: ScriptOptions,
        *,
        log_policy: str,
        on_event: OnEvent,
        on_trouble: Callable[[str], None],
        on_node_signal: Callable[[int, int], None],
    ) -> None:
        self._options = options
        self._log_policy = log_policy
        self._on_trouble = on_trouble
        self._endpoints: list[str] = []  # of the store
        request = NodesRequest(
            launch_id=options.launch_id,
            hosts=options.hosts,
            config=options.nodes,
            world_size=options.world_size,
            slots=options.slots,
            devices=options.devices if options.hosts is None and options.dial is None else options.device_spec,
            cwd=options.cwd,
            script=options.script,
            master_addr=options.master_addr,
            master_port=options.master_port,
        )
        self._site = LaunchSite(
            request,
            on_event,
            lease_s=options.lease_s,
            dial=options.dial,
            call_s=START_S,
            on_notice=lambda kind, text: on_trouble(f"{kind}: {text}" if kind == "refused" else text),
            on_node_signal=on_node_signal,
        )

    @property
    def supervisor(self) -> LaunchSupervisor | None:
        """The agents, from the first of them on."""
        return self._site.supervisor

    async def prepare(self) -> LaunchPlan:
        """Return the plan; the agents wait for their orders.

        Raises:
            EndpointInUseError: a live launch has this launch id, or the port that was asked for is taken.
            PreflightError: nodes cannot be used.
            ResourceError: the system has too few descriptors, threads, memory or disk.
        """
        check_resources(self._options.world_size or 1)
        self.plan = await self._site.prepare()
        with shortages_named():
            self._open_store()
        return self.plan

    def node_name(self, node_rank: int) -> str:
        """Return what to call a node where there are several; "" where there is one."""
        return self._site.node_name(node_rank)

    def node_lost(self, node_rank: int, event: AgentLost) -> NodeLostError:
        """Return the error of a node, or of its agent, that is gone."""
        return self._site.node_lost(node_rank, event)

    async def start(self) -> None:
        """Start the ranks; raises LaunchError where one could not be started."""
        if trouble := await self._site.start(self._order, START_S, is_script=True, log_dir=self._options.log_dir):
            self._on_trouble(trouble)

    def noise(self) -> list[tuple[str, str]]:
        """Return the last lines that logins of other nodes printed before their agents spoke, each with the node's name."""
        nodes = () if self.supervisor is None else self.supervisor.nodes
        return [(self.plan.nodes[node_rank].name, line) for node_rank, node in enumerate(nodes) for line in node.noise]

    def whereabouts(self, node_rank: int) -> dict[str, Any]:
        """Return host and clock error of a node's events, where there are several nodes."""
        if len(self.plan.nodes) == 1 or self.supervisor is None:
            return {}
        return {"host": self.plan.nodes[node_rank].name, "error_s": self.supervisor.nodes[node_rank].clock_error_s}

    async def stop(self) -> None:
        """End what is left; works half-started."""
        await self._site.stop(0.0, KILL_S)

    def close(self) -> None:
        """Give directory, ports and sockets back."""
        self._site.close()

    async def leave_callers(self, exit_code: int) -> None:
        """Have the processes of nodes that called in end with this code; the last of all."""
        await self._site.leave_callers(exit_code)

    def _open_store(self) -> None:
        """Serve the store where the ranks reach it: in the run directory, and by TCP for those of other nodes."""
        site = self._site
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        site.cleanups.callback(context.destroy, linger=0)
        site.open_door(context, lambda kind, rank, what: self._on_trouble(f"{kind}: {what}"), self._tell)
        server = ControlServer(context, site.endpoints("control"), site.door)
        self._endpoints = server.endpoints
        hub = ControlHub(
            server,
            token=site.token,
            world_size=self.plan.world_size,
            on_hello=_refuse_worker,
            on_progress=lambda rank: None,  # only workers report any
            on_error=self._tell,
        )
        site.cleanups.callback(hub.close)

    def _tell(self, error: Exception) -> None:
        self._on_trouble(f"control socket: {error}")

    def _order(self, node_rank: int) -> Start:
        options = self._options
        program, *arguments = options.argv

        def environment(rank: int, base: Mapping[str, str]) -> dict[str, str]:
            return script_environment(options, self.plan, rank, base)

        return node_order(
            self.plan,
            node_rank,
            options.nodes,
            secret=lambda rank: self._site.secret(rank, self._endpoints),
            start_method="spawn",
            argv=(self.plan.nodes[node_rank].python if program == sys.executable else program, *arguments),
            cwd=options.cwd,
            log_dir=options.log_dir,
            log_policy=self._log_policy,
            kill_s=KILL_S,
            has_sys_path=False,
            environment=environment,
        )


def script_plan(options: ScriptOptions, master_port: int, run_directory: str) -> LaunchPlan:
    """Return the plan of a script's launch on this node; starts and binds nothing."""
    return plan_local(
        launch_id=options.launch_id,
        world_size=options.world_size or 1,
        master_addr=options.master_addr or "127.0.0.1",
        master_port=master_port,
        run_directory=run_directory,
        devices=options.devices,
    )


def script_environment(options: ScriptOptions, plan: LaunchPlan, rank: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the whole environment of a rank: the launch's facts, what torch's elastic agent would set, and ``--env``."""
    environment = plan.rank_environment(rank, {**(os.environ if base is None else base), **options.environment})
    environment.update(options.environment)  # those too that are taken out as another launcher's
    environment.update(
        TORCHELASTIC_RUN_ID=options.run_id,
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_MAX_RESTARTS="0",
        TORCHELASTIC_ERROR_FILE=os.path.join(plan.node_of(rank).run_directory, f"error-r{rank:05d}.json"),
    )
    place, devices = plan.ranks[rank], plan.node_of(rank).devices
    if options.visible_devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = options.visible_devices
    elif devices is not None and place.device.startswith("cuda"):  # a script's local rank indexes what it sees
        environment.update(CUDA_VISIBLE_DEVICES=",".join(map(str, devices)), ZSPMD_DEVICE=f"cuda:{place.local_rank}")
    return environment


def _refuse_worker(rank: RankRecord) -> None:
    raise ProtocolError(f"rank {rank.rank} asks for a worker's welcome, and this launch runs a script")
