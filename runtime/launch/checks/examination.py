"""What each host of a launch over several nodes lacks, for ``zspmd-run doctor --hostfile``.

It asks what a launch asks (``assembly``) and goes on where a launch would stop: a host takes part in every check that it still can.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from dataclasses import replace

from ....config import NodesConfig
from ....errors import NodeProblem
from ..hosts.host import Host
from ..hosts.own_host import resolve_all, source_address
from ..nodes.assembly import rsh_links
from ..nodes.node_facts import CODE, PACKAGES, Examine, NodeFacts, gather_facts
from ..nodes.node_records import Listen, Listening, Reach, Reached
from ..nodes.preflight import (
    Place,
    compare_facts,
    find_address,
    find_driver_address,
    judge_listening,
    judge_reached,
    note_facts,
    reach_targets,
)
from ..nodes.reach import NONCE_BYTES, Listener
from .check_records import FAIL, OK, WARN, Check, CheckMachine, MachineChecks
from .examined_host import ExaminedHost

DRIVER = "the driver"
_REACH_S = 5.0


async def examine_nodes(
    hosts: Sequence[Host], config: NodesConfig, *, cwd: str = "", script: str = "", lease_s: float = 15.0
) -> list[tuple[str, list[Check]]]:
    """Return the outcome of every check, for each host by the name that its user knows; ``DRIVER`` last, if it has problems of its own.

    Args:
        cwd, script: what has to be there, on every host alike; empty for none.

    Raises:
        ConfigError: the command that reaches other nodes is not installed, or cannot do what a host asks for.
    """
    links = await rsh_links(hosts, config)
    examined = [ExaminedHost(host, link, config, lease_s) for host, link in zip(hosts, links)]
    try:
        of_driver = await _Examination(examined, config, Examine(cwd, script)).run()
    finally:
        await asyncio.gather(*(one.aclose() for one in examined))
    return [*((one.name, one.checks) for one in examined), *([(DRIVER, of_driver)] if of_driver else [])]


class _Examination:
    """The checks, in their order; each is one of all hosts at once."""

    def __init__(self, hosts: Sequence[ExaminedHost], config: NodesConfig, examine: Examine) -> None:
        self._hosts = hosts
        self._config = config
        self._examine = examine
        self._of_driver: list[Check] = []

    async def run(self) -> list[Check]:
        """Go through them; returns those of the driver that have failed."""
        gate = asyncio.Semaphore(self._config.fanout)

        async def attach(one: ExaminedHost) -> None:
            async with gate:
                await one.attach()
            one.facts = await one.ask(self._examine, NodeFacts)

        await asyncio.gather(*map(attach, self._hosts))
        reference = gather_facts(self._examine)
        self._compare(reference)
        await self._choose_addresses()
        await self._try_ways(reference)
        await asyncio.gather(*(self._check_machine(one) for one in self._hosts if not one.is_local))
        return self._of_driver

    def _compare(self, reference: NodeFacts) -> None:
        known = [(one.name, one.facts) for one in self._hosts if one.facts is not None]
        problems = compare_facts(reference, known, allow_same_host=self._config.allow_same_host)
        for one in self._hosts:
            own = [problem for problem in problems if problem.host == one.name]
            for problem in own:
                one.add_problem(problem)
            if one.facts is None:
                continue
            failed = {problem.check for problem in own}
            if not failed & {"zspmd", "python", *PACKAGES}:
                one.add("versions", OK, _versions(one.facts))
            if self._examine.cwd and not failed & {"cwd", "script"}:
                one.add("files", OK, ", ".join(filter(None, (self._examine.cwd, self._examine.script))))
            for note in note_facts([(one.name, one.facts)]):
                one.add(note.check, WARN, note.text, note.advice)

    async def _choose_addresses(self) -> None:
        resolved = await resolve_all([one.host.name for one in self._hosts])
        for one, addresses in sorted(zip(self._hosts, resolved), key=lambda pair: pair[0].is_local):  # this machine's by the way to others
            if one.facts is None:
                continue
            facts = replace(one.facts, ssh_connection="") if one.is_local else one.facts
            hints = [*addresses, *(self._routed() if one.is_local else ())]
            found = find_address(one.host, facts, self._config.iface, resolved=hints)
            if isinstance(found, NodeProblem):
                one.add_problem(found)
            else:
                one.address = found[0]
                one.add("address", OK, f"{found[0]} of {found[1]}, out of {', '.join(one.facts.addresses)}")

    async def _try_ways(self, reference: NodeFacts) -> None:
        """Have every node connect to the others, and to the driver."""
        ports = await asyncio.gather(*map(self._listen, self._hosts))
        listening = [(one, Place(one.name, one.address, port)) for one, port in zip(self._hosts, ports) if port]
        own = Listener(self._driver_address(reference))
        try:
            driver = Place(DRIVER, own.address, await self._open(own))
            targets = reach_targets([place for _, place in listening], driver)
            nonce = secrets.token_bytes(NONCE_BYTES)
            reachable = [[place for place in tried if place.port] for tried in targets]
            await asyncio.gather(*(_try_way(one, tried, nonce) for (one, _), tried in zip(listening, reachable)))
        finally:
            own.close()

    async def _listen(self, one: ExaminedHost) -> int:
        """Return the port of a host's listener, 0 where it has none."""
        told = await one.ask(Listen(one.address), Listening) if one.address else None
        for problem in judge_listening(one.name, one.address, "" if told is None else told.error):
            one.add_problem(problem)
        return 0 if told is None else told.port

    async def _open(self, own: Listener) -> int:
        """Return the port of the driver's listener, 0 where it has none."""
        try:
            return await own.open() if own.address else 0
        except OSError as error:
            self._fail_driver(*judge_listening(DRIVER, own.address, error.strerror or str(error)))
            return 0

    def _driver_address(self, reference: NodeFacts) -> str:
        """Return where the driver would listen; nothing where that cannot be decided, which is a problem of its own."""
        known = [one for one in self._hosts if one.facts is not None]
        local = next((one for one in self._hosts if one.is_local), None)
        if local is not None or not known:
            return "" if local is None else local.address
        facts = [one.facts for one in known if one.facts is not None]
        found = find_driver_address(reference, facts, self._config.iface, routed=self._routed())
        if isinstance(found, NodeProblem):
            self._fail_driver(found)
            return ""
        return found[0]

    def _routed(self) -> list[str]:
        """Return from which addresses of this machine packets to the hosts go."""
        routed = []
        for one in self._hosts:
            with contextlib.suppress(OSError):  # no way there: the hosts' own attempts say so
                routed += [source_address(one.address)] if one.address else []
        return routed

    def _fail_driver(self, *problems: NodeProblem) -> None:
        self._of_driver += [Check(problem.check, FAIL, problem.text, problem.advice) for problem in problems]

    async def _check_machine(self, one: ExaminedHost) -> None:
        """Run there what ``doctor`` runs on the driver's own machine."""
        told = await one.ask(CheckMachine(), MachineChecks)
        if told is not None:
            one.checks += told.checks
            await one.check_torch()
            one.check_clock()


async def _try_way(one: ExaminedHost, targets: Sequence[Place], nonce: bytes) -> None:
    asked = Reach(tuple(f"{place.address} {place.port}" for place in targets), nonce, _REACH_S)
    told = await one.ask(asked, Reached) if targets else None
    problems = [] if told is None else judge_reached(one.name, targets, told.errors)
    for problem in problems:
        one.add_problem(problem)
    if told is not None and not problems:
        one.add("tcp", OK, f"reaches {', '.join(place.host for place in targets)}")


def _versions(facts: NodeFacts) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version and name != CODE)
    return f"as the driver's: python {facts.python_version}, {packages}"
