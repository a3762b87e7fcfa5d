"""Check whether launches can run here, or on the hosts that are named, and say what to mend: one line a check.

Exit codes: 0 nothing has failed, 1 something has, 2 wrong input, such as a hostfile that cannot be read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...config import NodesConfig
from ...errors import ConfigError, LaunchError
from ..launch.agent_protocol import RankExited, RankLog, RankStart, Start
from ..launch.checks.check_records import FAIL, OK, Check
from ..launch.checks.machine import MACHINE_CHECKS
from ..launch.checks.torch_check import ASK_TORCH, TORCH_S, judge_torch, slow_torch
from ..launch.devices import num_cuda_devices
from ..launch.hosts.host import Host
from ..launch.hosts.host_lists import parse_host_list
from ..launch.hosts.host_selection import select_hosts
from ..launch.hosts.hostfile import read_hostfile
from ..launch.supervisor import AgentLost, Event, NodeSupervisor

if TYPE_CHECKING:
    from ..launch.cli import LaunchOptions

USES = ("hosts",)
HERE = "this machine"
_LAUNCH_S = 30.0
Tell = Callable[[str, Check], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the program's arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON list of checks instead of lines")
    parser.add_argument("--hostfile", metavar="FILE", help="check every host of it too, and the ways between them; - is standard input")
    parser.add_argument("--host", metavar="LIST", help="hosts instead of a file: h1,h2")
    parser.add_argument("--script", default="", metavar="FILE", help="a file that has to be the same on every host")


def prepare(arguments: argparse.Namespace, options: LaunchOptions) -> str:
    """Return what the program is about."""
    hosts = _read_hosts(arguments, options)
    return f"checks of this machine and {', '.join(host.target for host in hosts)}" if hosts else "checks of this machine"


def run(arguments: argparse.Namespace, options: LaunchOptions) -> Coroutine[Any, Any, int]:
    """Return the checks as a coroutine."""
    return _examine(arguments.json, _read_hosts(arguments, options), options.nodes, arguments.script)


def _read_hosts(arguments: argparse.Namespace, options: LaunchOptions) -> Sequence[Host]:
    """Return the hosts to look at, whether they are named before the program's name or behind it."""
    if arguments.hostfile is not None and arguments.host is not None:
        raise ConfigError("--hostfile and --host are both given; name the hosts by one of them")
    if arguments.hostfile is None and arguments.host is None:
        return options.hosts or ()
    hosts = parse_host_list(arguments.host) if arguments.hostfile is None else read_hostfile(arguments.hostfile)
    nodes = options.nodes
    return select_hosts(hosts, include=nodes.include, exclude=nodes.exclude, num_nodes=nodes.num_nodes)


async def _examine(is_json: bool, hosts: Sequence[Host], nodes: NodesConfig, script: str) -> int:
    told: list[tuple[str, Check]] = []

    def tell(host: str, check: Check) -> None:
        if not is_json and hosts and host not in dict(told):
            print(f"{host}:", flush=True)
        told.append((host, check))
        if not is_json:
            print(f"{check.status:<5} {check.name:<14} {check.text}" + (f"\n      -> {check.advice}" if check.advice else ""), flush=True)

    await _examine_machine(tell)
    if hosts:
        await _examine_hosts(hosts, nodes, script, tell)
    if is_json:
        print(json.dumps([{"host": host, **asdict(check)} for host, check in told], indent=2))
    elif hosts:
        print(_summary(told))
    return int(any(check.status == FAIL for _, check in told))


async def _examine_machine(tell: Tell) -> None:
    for check in MACHINE_CHECKS:
        tell(HERE, check())
    tell(HERE, await check_torch())
    tell(HERE, await check_launch())


async def _examine_hosts(hosts: Sequence[Host], nodes: NodesConfig, script: str, tell: Tell) -> None:
    from ..launch.checks.examination import examine_nodes

    for host, checks in await examine_nodes(hosts, nodes, cwd=os.getcwd(), script=script):
        for check in checks:
            tell(host, check)


def _summary(told: Sequence[tuple[str, Check]]) -> str:
    """Return one line for all: which hosts are fine, and what failed on which."""
    failed: dict[str, list[str]] = {host: [] for host, _ in told}
    for host, check in told:
        if check.status == FAIL and check.name not in failed[host]:
            failed[host].append(check.name)
    fine = [host for host, names in failed.items() if not names]
    parts = [f"{host}: {', '.join(names)}" for host, names in failed.items() if names]
    return f"failed at {'; '.join(parts)}; fine: {', '.join(fine) or 'none'}" if parts else f"fine: {', '.join(fine)}"


async def check_torch() -> Check:
    """torch, in a process of its own, since this one is never to import it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ASK_TORCH, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        told, errors = await asyncio.wait_for(process.communicate(), TORCH_S)
    except asyncio.TimeoutError:
        return slow_torch()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return judge_torch(process.returncode or 0, told.decode(errors="replace"), errors.decode(errors="replace"), num_cuda_devices())


async def check_launch() -> Check:
    """A launch of two ranks that print a line: the agent, its supervision, and what the kernel does for it."""
    lines: list[str] = []
    exits: list[int] = []
    ended = asyncio.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, RankLog):
            lines.extend(event.lines)
        elif isinstance(event, RankExited):
            exits.append(event.exit_code)
        if isinstance(event, AgentLost) or len(exits) == 2:
            ended.set()

    started = time.monotonic()
    ranks = tuple(RankStart(rank, dict(os.environ)) for rank in range(2))
    order = Start(ranks, "spawn", argv=(sys.executable, "-I", "-S", "-c", "print('here')"))
    supervisor = NodeSupervisor(on_event)
    try:
        supervisor.open()
        await supervisor.start(order, timeout_s=_LAUNCH_S)
        await asyncio.wait_for(ended.wait(), _LAUNCH_S)
    except (ConfigError, LaunchError, asyncio.TimeoutError) as error:
        return Check("launch", FAIL, f"two ranks could not be run: {error or 'no end in sight'}", "the lines above may say why")
    finally:
        await supervisor.stop(0.0, 1.0)
    if exits != [0, 0] or lines != ["here", "here"]:
        return Check("launch", FAIL, f"two ranks ended with {exits} and printed {lines}", "python -I -S -c \"print('here')\" must work")
    return Check("launch", OK, f"two ranks ran and ended in {time.monotonic() - started:.2f} s")
