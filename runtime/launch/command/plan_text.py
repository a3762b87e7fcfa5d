"""The plan of a launch as people see it: by ``--dry-run``, as text or JSON, and at the start on several nodes."""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ....topology import axis_groups
from ....transport.security import tcp_endpoint
from ..devices import available_cores
from ..hosts.host import Host
from ..hosts.own_host import find_own
from ..nodes.forwarded import forwarded_environment
from ..plan import LaunchPlan, NodePlan, RankPlan, is_foreign, place_ranks, plan_local
from ..ports import first_candidate
from ..run_directory import run_directory_path
from .folding import fold_numbers
from .options import LaunchOptions, ScriptOptions

_MAX_NAMES = 6
_UNKNOWN = "?"


def dry_plan(options: LaunchOptions | ScriptOptions) -> LaunchPlan:
    """Return the plan as far as it is known without asking a node, which leaves out addresses there and what depends on its GPUs.

    Raises:
        TopologyError: too few slots.
    """
    if options.hosts is not None:
        return _dry_nodes(options, options.hosts)
    address, port = ("127.0.0.1", 0) if isinstance(options, LaunchOptions) else (options.master_addr, options.master_port)
    return plan_local(
        launch_id=options.launch_id,
        world_size=options.parallel.world_size if isinstance(options, LaunchOptions) else options.world_size or 1,
        master_addr=address,
        master_port=port or first_candidate(options.launch_id, "master"),
        run_directory=str(run_directory_path(options.launch_id)),
        devices=options.devices,
    )


def describe_program(
    options: LaunchOptions, program: str, described: str, bind: str | None, shares: Sequence[Mapping[str, object]] = ()
) -> str:
    """Return the plan of a program as text: launch, endpoints, ranks and mesh, and a table of ``shares``, what each rank holds."""
    plan = dry_plan(options)
    names = ("step", "result", "control")
    directory = plan.nodes[0].run_directory
    axes = ("tp", "pp", "dp") if options.parallel.ep == 1 else ("tp", "pp", "dp", "ep")
    facts = [
        *(f"socket   {f'ipc://{directory}/{name}' if bind is None else tcp_endpoint(bind)}" for name in names if options.hosts is None),
        *(f"mesh     {axis}: {' '.join(str(list(ranks)) for ranks in axis_groups(options.parallel, axis))}" for axis in axes),
    ]
    text = _text(plan, options, f"program  {program}: {described}", "first candidate", facts)
    return "\n".join([text, *_share_table(shares)])


def describe_script(options: ScriptOptions) -> str:
    """Return the plan of a script as text: what is executed, where, with which port, threads and variables."""
    plan = dry_plan(options)
    facts = [f"cwd      {options.cwd}"]
    if options.hosts is None:
        from ...driver.script_processes import script_environment

        environment = script_environment(options, plan, 0)
        facts = [
            f"socket   ipc://{plan.nodes[0].run_directory}/control",
            *facts,
            f"threads  OMP_NUM_THREADS={environment['OMP_NUM_THREADS']}",
            f"devices  CUDA_VISIBLE_DEVICES={environment.get('CUDA_VISIBLE_DEVICES', '(not set)')}",
        ]
    facts += [
        f"env      {' '.join(options.environment) or '(nothing beside this environment and the facts of the launch)'}",
        f"logs     {options.log_dir or '(none)'}",
    ]
    chosen = "as given" if options.master_port else "first candidate"
    return _text(plan, options, f"script   {shlex.join(options.argv)}", chosen, facts)


def describe_nodes(plan: LaunchPlan, options: LaunchOptions | ScriptOptions) -> str:
    """Return what is told at the start of a launch over several nodes: its machines, their ranks, and what travels to them."""
    return "\n".join(line.rstrip() for line in (_headline(plan), *_node_table(plan, options), *_node_facts(options)))


def plan_facts(
    plan: LaunchPlan, options: LaunchOptions | ScriptOptions, command: str, shares: Sequence[Mapping[str, object]] = ()
) -> dict[str, Any]:
    """Return the plan as what ``--dry-run --json`` prints, ``shares`` among it; names of variables, and none of their values."""
    return {
        "launch_id": plan.launch_id,
        "command": command,
        "cwd": os.getcwd(),
        "world_size": plan.world_size or None,
        "master_addr": plan.master_addr or None,
        "master_port": plan.master_port,
        "log_dir": options.log_dir,
        "relay": options.nodes.relay,
        "parallel": asdict(options.parallel) if isinstance(options, LaunchOptions) else None,
        "shares": list(shares),
        "environment": {"set": sorted(_set_names(options)), "forwarded": _forwarded(options), "removed": _removed()},
        "nodes": [
            {
                "node_rank": node_rank,
                "host": node.name,
                "target": _target(options.hosts, node_rank, node),
                "is_local": node.is_local,
                "address": node.address or None,
                "iface": node.iface or None,
                "run_directory": node.run_directory,
                "ranks": [
                    {"rank": place.rank, "local_rank": place.local_rank, "device": place.device or None}
                    for place in plan.node_ranks(node_rank)
                ],
            }
            for node_rank, node in enumerate(plan.nodes)
        ],
    }


def _dry_nodes(options: LaunchOptions | ScriptOptions, hosts: Sequence[Host]) -> LaunchPlan:
    world_size = options.parallel.world_size if isinstance(options, LaunchOptions) else options.world_size
    slots = [host.slots for host in hosts]
    places = [] if None in slots else place_ranks([host.target for host in hosts], [number or 0 for number in slots], world_size)
    kept = [*hosts][: places[-1][0] + 1] if places else [*hosts]
    own = asyncio.run(find_own([host.name for host in kept]))
    first = own.index(True) if True in own else -1
    master_port = options.master_port if isinstance(options, ScriptOptions) else 0
    return LaunchPlan(
        launch_id=options.launch_id,
        world_size=len(places),
        ranks=tuple(RankPlan(rank, local, node, _device(hosts[node], local, options)) for rank, (node, local) in enumerate(places)),
        master_addr=(options.master_addr if isinstance(options, ScriptOptions) else "") or kept[0].addr or "",
        master_port=master_port or first_candidate(options.launch_id, "master"),
        nodes=tuple(
            NodePlan(
                name=host.name,
                address=host.addr or "",
                run_directory=str(run_directory_path(options.launch_id, 0 if index == first else index or len(kept))),
                is_local=index == first,
                iface=host.iface or options.nodes.iface or "",
            )
            for index, host in enumerate(kept)
        ),
    )


def _device(host: Host, local_rank: int, options: LaunchOptions | ScriptOptions) -> str:
    if options.device_spec == "cpu":
        return "cpu"
    return f"cuda:{host.devices[local_rank]}" if host.devices is not None and local_rank < len(host.devices) else ""


def _text(plan: LaunchPlan, options: LaunchOptions | ScriptOptions, command: str, chosen: str, facts: Sequence[str]) -> str:
    if options.hosts is not None:
        lines = [_headline(plan), command, *facts, *_node_table(plan, options), *_node_facts(options)]
        return "\n".join(line.rstrip() for line in lines)
    lines = [
        f"launch   {plan.launch_id}",
        command,
        f"world    {plan.world_size} rank{'s' if plan.world_size > 1 else ''} on {len(plan.hosts)} host",
        f"master   {plan.master_addr}:{plan.master_port} ({chosen})",
        *facts,
    ]
    rows = plan.describe()
    lines.append("         ".join(("", "  ".join(f"{name:<9}" for name in rows[0]))))
    lines += ["rank     " + "  ".join(f"{value:<9}" for value in row.values()) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _headline(plan: LaunchPlan) -> str:
    counts = [len(plan.node_ranks(node_rank)) for node_rank in range(len(plan.nodes))]
    each = f"{counts[0]}" if len(set(counts)) == 1 else "+".join(map(str, counts))
    nodes = f"{len(counts)} node{'s' if len(counts) > 1 else ''}"
    world = f"world {plan.world_size} = {nodes} x {each}" if plan.ranks else f"world: the GPUs of {nodes}"
    return f"plan     launch {plan.launch_id}  {world}  master {plan.master_addr or _UNKNOWN}:{plan.master_port}"


def _node_table(plan: LaunchPlan, options: LaunchOptions | ScriptOptions) -> list[str]:
    rows = [("rank", "local", "host", "addr", "iface", "dev", "omp")]
    for node_rank, node in enumerate(plan.nodes):
        ranks = plan.node_ranks(node_rank)
        rows.append(
            (
                fold_numbers([place.rank for place in ranks]) or _UNKNOWN,
                fold_numbers([place.local_rank for place in ranks]) or _UNKNOWN,
                _target(options.hosts, node_rank, node) + (" (local)" if node.is_local else ""),
                node.address or _UNKNOWN,
                node.iface or "-",
                _fold_devices([place.device for place in ranks]),
                _threads(node, len(ranks)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["   " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)) for row in rows]


def _share_table(shares: Sequence[Mapping[str, object]]) -> list[str]:
    if not shares:
        return []
    rows = [[name.replace("_", " ") for name in shares[0]], *([_shown(value) for value in share.values()] for share in shares)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [f"{'holds' if not number else '':<9}{line}" for number, line in enumerate(lines)]


def _shown(value: object) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _node_facts(options: LaunchOptions | ScriptOptions) -> list[str]:
    forwarded, removed, config = _forwarded(options), _removed(), options.nodes
    taken_out = f" -{len(removed)} ({_some(removed)})" if removed else ""
    facts = [
        f"env +{len({*forwarded, *_set_names(options)})}{taken_out}",
        f"by {config.rsh}",
        *([f"relay {config.relay}"] if isinstance(options, LaunchOptions) else []),
        f"preflight {'yes' if config.is_preflight else 'no'}",
    ]
    return ["   " + "  ".join(facts), *([f"   logs {options.log_dir}, on each node"] if options.log_dir else [])]


def _threads(node: NodePlan, num_ranks: int) -> str:
    if given := os.environ.get("OMP_NUM_THREADS"):
        return given
    cores = available_cores() if node.is_local else node.num_cores
    return _UNKNOWN if cores is None or not num_ranks else str(max(1, cores // num_ranks))


def _target(hosts: Sequence[Host] | None, node_rank: int, node: NodePlan) -> str:
    host = hosts[node_rank] if hosts is not None and node_rank < len(hosts) else None
    if host is None or host.name != node.name:
        return node.name
    return host.target if host.port is None else f"{host.target}:{host.port}"


def _fold_devices(devices: Sequence[str]) -> str:
    if not devices or "" in devices:
        return _UNKNOWN
    indices = [int(device.removeprefix("cuda:")) for device in devices if device.startswith("cuda:")]
    return f"cuda:{fold_numbers(indices)}" if len(indices) == len(devices) else ",".join(dict.fromkeys(devices))


def _set_names(options: LaunchOptions | ScriptOptions) -> set[str]:
    return set(options.environment) if isinstance(options, ScriptOptions) else set()


def _forwarded(options: LaunchOptions | ScriptOptions) -> list[str]:
    return sorted(forwarded_environment(options.nodes.environment)) if options.hosts is not None else []


def _removed() -> list[str]:
    return sorted(name for name in os.environ if is_foreign(name))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (" …" if len(names) > _MAX_NAMES else "")
