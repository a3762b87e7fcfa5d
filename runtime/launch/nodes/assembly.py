"""From hosts to a plan: agents are started on all nodes, and everything is compared and proved before a rank is.

    attach     an agent answers on every host                      ssh, --rsh, or the node has called in itself
    examine    what is there: versions, directory, script, GPUs    compared with the driver's
    place      ranks by slots; hosts without a rank are let go
    address    one for each node, and proved: every node connects to all the others and to the driver
    prepare    each node's run directory; the master port on node 0

Whatever fails is told for all hosts at once, by PreflightError. On the driver's machine alone nothing of this is needed. One method a step
makes the file what it is, 360 lines.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shlex
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ....config import NodesConfig
from ....errors import LaunchError, NodeProblem, PreflightError
from ..agent_protocol import AgentRecord
from ..hosts.host import Host
from ..hosts.own_host import find_own, resolve_all, source_address
from ..launch_supervisor import LaunchSupervisor, OnEvent
from ..plan import LaunchPlan, NodePlan, RankPlan, place_devices, place_ranks
from ..ports import hold_port, reserve_port
from .agent_link import AgentLink, RshLink, trial_argv
from .node_facts import Examine, NodeFacts, gather_facts
from .node_records import Listen, Listening, Prepare, Prepared, Reach, Reached
from .nodes_request import NodesRequest
from .preflight import (
    Place,
    check_capacity,
    compare_facts,
    find_address,
    find_driver_address,
    judge_listening,
    judge_reached,
    reach_targets,
)
from .reach import NONCE_BYTES, Listener

ATTACH_S = 40.0
ASK_S = 60.0
REACH_S = 5.0
_LOOPBACK = ("127.0.0.1", "lo")
AnswerT = TypeVar("AnswerT", bound=AgentRecord)


@dataclass
class Node:
    """A host on its way to be a node."""

    host: Host
    facts: NodeFacts | None = None
    address: str = ""
    iface: str = ""
    slots: int = 0
    prepared: Prepared = field(default_factory=Prepared)


class Assembly:
    """Makes the plan of one launch over several nodes. ``open``, then ``plan``, once; ``supervisor`` has the agents from ``open`` on.

    Args:
        cleanups: where to put what gives the master port back, where this process holds it.
    """

    def __init__(self, request: NodesRequest, on_event: OnEvent, *, lease_s: float, cleanups: contextlib.ExitStack) -> None:
        self.driver_address = ""
        self._request = request
        self._on_event = on_event
        self._lease_s = lease_s
        self._cleanups = cleanups
        self._nodes: list[Node] = []

    async def open(self) -> LaunchSupervisor:
        """Find out which host is this machine, and start the agent here if one is."""
        request = self._request
        hosts = _needed(request, request.hosts or ())
        links = await rsh_links(hosts, request.config) if request.links is None else request.links
        self._nodes = [Node(host) for host in hosts]
        self.supervisor = LaunchSupervisor(self._on_event, links, lease_s=self._lease_s)
        self.supervisor.open()
        return self.supervisor

    async def plan(self, run_directory: Path) -> LaunchPlan:
        """Return the plan, of which everything has been proved.

        Args:
            run_directory: of the driver's own node.

        Raises:
            PreflightError: nodes cannot be reached, differ, or do not reach each other.
            TopologyError: too few slots, or devices.
            ConfigError: no address fits.
        """
        await self._attach()
        reference = await self._examine()
        places = self._place()
        await self.supervisor.keep(sorted({node for node, _ in places}))
        self._nodes = self._nodes[: len(self.supervisor.nodes)]
        ranks = self._assign_devices(places)
        await self._choose_addresses(reference)
        if self._request.config.is_preflight:
            await self._prove_addresses()
        master_port = await self._prepare()
        return self._describe(ranks, master_port, run_directory)

    # --- the steps ---

    async def _attach(self) -> None:
        failures = await self.supervisor.attach(fanout=self._request.config.fanout, timeout_s=ATTACH_S)
        _raise([self._no_agent(rank, error) for rank, error in sorted(failures.items())], self._names)

    def _no_agent(self, node_rank: int, error: LaunchError) -> NodeProblem:
        noise = self.supervisor.nodes[node_rank].noise
        said = f"; its login printed: {noise[-1]}" if noise else ""
        host = self._nodes[node_rank].host
        return NodeProblem(host.target, "agent", f"{error}{said}", agent_advice(str(error), host, self._request.config))

    async def _examine(self) -> NodeFacts:
        """Have every node's facts; returns those of the driver's machine."""
        cwd = self._request.cwd or os.getcwd()
        script = self._request.script and os.path.join(cwd, self._request.script)

        async def examine(node_rank: int) -> NodeFacts:
            return await self._ask(node_rank, Examine(cwd=cwd, script=script), NodeFacts)

        for node, facts in zip(self._nodes, await self._of_all(examine, "facts")):
            node.facts = facts
        reference = gather_facts(Examine(cwd=cwd, script=script))
        if self._request.config.is_preflight:
            named = [(node.host.target, _known(node.facts)) for node in self._nodes]
            _raise(compare_facts(reference, named, allow_same_host=self._request.config.allow_same_host), self._names)
        return reference

    def _place(self) -> list[tuple[int, int]]:
        for node in self._nodes:
            devices = node.host.devices
            node.slots = _first(
                node.host.slots, self._request.slots, len(devices) if devices else None, _known(node.facts).cuda_devices or 1
            )
        return place_ranks(self._names, [node.slots for node in self._nodes], self._request.world_size)

    async def _choose_addresses(self, reference: NodeFacts) -> None:
        if self._request.is_one_machine or self._is_here_alone:
            return self._stay_here()
        config, local = self._request.config, self._local
        resolved = await resolve_all([node.host.name for node in self._nodes])
        problems = []
        for node_rank in sorted(range(len(self._nodes)), key=lambda rank: rank == local):  # this machine last, by the way to the others
            found = self._find_address(node_rank, resolved[node_rank])
            if isinstance(found, NodeProblem):
                problems.append(found)
            else:
                self._nodes[node_rank].address, self._nodes[node_rank].iface = found
        _raise(problems, self._names)
        if self._request.bind or local is not None:
            self.driver_address = self._request.bind or self._nodes[local or 0].address
            return
        told = find_driver_address(reference, [_known(node.facts) for node in self._nodes], config.iface, routed=self._routed())
        if isinstance(told, NodeProblem):
            _raise([told._replace(host="the driver")], self._names)
        else:
            self.driver_address = told[0]

    def _find_address(self, node_rank: int, resolved: Sequence[str]) -> tuple[str, str] | NodeProblem:
        node, iface = self._nodes[node_rank], self._request.config.iface
        facts = _known(node.facts)
        if node_rank != self._local:
            return find_address(node.host, facts, iface, resolved=resolved)
        # What sshd has told here is of a login of the user's, on any network.
        return find_address(node.host, replace(facts, ssh_connection=""), iface, resolved=[*resolved, *self._routed()])

    def _routed(self) -> list[str]:
        """Return from which addresses this machine reaches the nodes that have theirs by now."""
        return [address for node in self._nodes if node.address and (address := source_address(node.address))]

    @property
    def _is_here_alone(self) -> bool:
        request, host = self._request, self._nodes[0].host
        is_told = bool(host.addr or host.iface or request.config.iface or request.bind or request.master_addr)
        return len(self._nodes) == 1 and self._local == 0 and not is_told

    def _stay_here(self) -> None:
        for node in self._nodes:
            node.address, node.iface = _LOOPBACK
        self.driver_address = _LOOPBACK[0]

    async def _prove_addresses(self) -> None:
        """Have every node connect to the others, and to the driver where that is at an address of its own."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        own = Listener(self.driver_address)
        try:
            driver_port = await self._listen(own)
            listening = await self._of_all(lambda rank: self._ask(rank, Listen(self._nodes[rank].address), Listening), "listen")
            ends = [(node.host.target, node.address, told) for node, told in zip(self._nodes, listening)]
            _raise([p for name, address, told in ends for p in judge_listening(name, address, told.error)], self._names)
            places = [Place(name, address, told.port) for name, address, told in ends]
            targets = reach_targets(places, Place("the driver", self.driver_address, driver_port))

            def connect(rank: int) -> Coroutine[Any, Any, Reached]:
                tried = tuple(f"{place.address} {place.port}" for place in targets[rank])
                return self._ask(rank, Reach(tried, nonce, REACH_S), Reached)

            reached = await self._of_all(connect, "reach")
            judged = (judge_reached(place.host, tried, told.errors) for place, tried, told in zip(places, targets, reached))
            _raise([problem for problems in judged for problem in problems], self._names)
        finally:
            own.close()

    async def _listen(self, own: Listener) -> int:
        try:
            return await own.open()
        except OSError as error:
            raise _preflight(judge_listening("the driver", self.driver_address, error.strerror or str(error)), self._names) from error

    async def _prepare(self) -> int:
        request = self._request
        master_addr = request.master_addr or self._nodes[0].address

        async def prepare(node_rank: int) -> Prepared:
            node = self.supervisor.nodes[node_rank]
            if node.is_local:
                return Prepared()
            is_master = node_rank == 0
            order = Prepare(request.launch_id, node_rank or len(self._nodes), master_addr if is_master else "", request.master_port)
            told = await self._ask(node_rank, order, Prepared)
            if told.error:
                raise LaunchError(told.error)
            return told

        for node, prepared in zip(self._nodes, await self._of_all(prepare, "prepare")):
            node.prepared = prepared
        if not self.supervisor.nodes[0].is_local:
            return self._nodes[0].prepared.master_port
        port = request.master_port
        held = hold_port(master_addr, port) if port else reserve_port(request.launch_id, "master", master_addr)
        self._cleanups.callback(held.close)
        return held.port

    def _assign_devices(self, places: Sequence[tuple[int, int]]) -> tuple[RankPlan, ...]:
        devices = place_devices(self._request.devices, places, [_cuda(node) for node in self._nodes])
        ranks = tuple(
            RankPlan(rank, self._first_local(node) + local, node, device)
            for rank, ((node, local), device) in enumerate(zip(places, devices))
        )
        problems = []
        for node_rank, node in enumerate(self._nodes):
            used = [rank.device for rank in ranks if rank.node_rank == node_rank]
            problems += check_capacity(node.host.target, _known(node.facts), used)
        _raise(problems, self._names)
        return ranks

    def _first_local(self, node_rank: int) -> int:
        return self._request.local_places[node_rank][0] if self._request.local_places else 0

    def _describe(self, ranks: tuple[RankPlan, ...], master_port: int, run_directory: Path) -> LaunchPlan:
        return LaunchPlan(
            launch_id=self._request.launch_id,
            world_size=len(ranks),
            ranks=ranks,
            master_addr=self._request.master_addr or self._nodes[0].address,
            master_port=master_port,
            nodes=tuple(
                NodePlan(
                    name=node.host.name,
                    address=node.address,
                    run_directory=node.prepared.run_directory or str(run_directory),
                    is_local=agent.is_local,
                    iface=node.iface,
                    num_cores=_known(node.facts).cores,
                    python=_known(node.facts).executable,
                    devices=node.host.devices,
                    local_place=self._request.local_places[node_rank] if self._request.local_places else None,
                )
                for node_rank, (node, agent) in enumerate(zip(self._nodes, self.supervisor.nodes))
            ),
        )

    @property
    def _names(self) -> list[str]:
        return [node.host.target for node in self._nodes]

    @property
    def _local(self) -> int | None:
        """Which node is this machine."""
        return next((rank for rank, node in enumerate(self.supervisor.nodes) if node.is_local), None)

    async def _ask(self, node_rank: int, question: AgentRecord, answer: type[AnswerT]) -> AnswerT:
        return await self.supervisor.nodes[node_rank].ask(question, answer, ASK_S)

    async def _of_all(self, ask: Callable[[int], Coroutine[Any, Any, AnswerT]], what: str) -> list[AnswerT]:
        """Ask every node at once; tells of all that fail."""
        told = await asyncio.gather(*(ask(rank) for rank in range(len(self.supervisor.nodes))), return_exceptions=True)
        problems = []
        answers: list[AnswerT] = []
        for node, answer in zip(self._nodes, told):
            if isinstance(answer, LaunchError):
                problems.append(NodeProblem(node.host.target, what, str(answer), "see what that node does; run it again"))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                answers.append(answer)
        _raise(problems, self._names)
        return answers


async def rsh_links(hosts: Sequence[Host], config: NodesConfig) -> list[AgentLink | None]:
    """Return the way to each host; None for the first that is this machine, which needs none."""
    own = await find_own([host.name for host in hosts])
    first = own.index(True) if True in own else -1
    return [None if index == first else RshLink(host, config) for index, host in enumerate(hosts)]


def _needed(request: NodesRequest, hosts: tuple[Host, ...]) -> tuple[Host, ...]:
    """Return the first hosts that have slots enough, where all say how many they have; the others are spare."""
    num_slots = 0
    for index, host in enumerate(hosts):
        slots = _first(host.slots, request.slots)
        if request.world_size is None or request.links is not None or slots is None:
            break
        num_slots += slots
        if num_slots >= request.world_size:
            return hosts[: index + 1]
    return hosts


def _cuda(node: Node) -> list[int]:
    count = _known(node.facts).cuda_devices
    return list(node.host.devices) if node.host.devices is not None else list(range(count))


def _first(*values: int | None) -> Any:
    return next((value for value in values if value is not None), None)


def _known(facts: NodeFacts | None) -> NodeFacts:
    assert facts is not None, "every node was examined"
    return facts


def _raise(problems: Sequence[NodeProblem], hosts: Sequence[str]) -> None:
    if problems:
        raise _preflight(problems, hosts)


def _preflight(problems: Sequence[NodeProblem], hosts: Sequence[str]) -> PreflightError:
    wrong = {problem.host for problem in problems}
    return PreflightError(problems, fine=[host for host in hosts if host not in wrong])


def agent_advice(error: str, host: Host, config: NodesConfig) -> str:
    """Return what to do about an agent that does not answer."""
    if "No module named" in error or ("zspmd" in error and "version" in error):
        return "install the same zspmd there, or name the interpreter that has it: --remote-python, python= in its line"
    if "exited with code 127" in error or "not found" in error:
        return "there is no such interpreter; name one: --remote-python, python= in its line"
    return f"this must print 'works' and ask nothing: {shlex.join(trial_argv(host, config))}"
