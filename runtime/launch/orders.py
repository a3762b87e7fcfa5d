"""What the agent of a node is told to start: the plan, as far as that node goes, and what its ranks need to find there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence

from ...config import NodesConfig
from .agent_protocol import RankStart, RelayOrder, Start
from .nodes.forwarded import forwarded_environment, program_paths
from .plan import LaunchPlan

# (rank, what its environment is made from) -> its whole environment
BuildEnvironment = Callable[[int, Mapping[str, str]], dict[str, str]]


def node_order(
    plan: LaunchPlan,
    node_rank: int,
    config: NodesConfig,
    *,
    secret: Callable[[int], bytes],
    start_method: str,
    argv: Sequence[str],
    cwd: str,
    kill_s: float,
    preload: Sequence[str] = (),
    log_dir: str | None = None,
    log_policy: str = "drop",
    has_sys_path: bool = True,
    environment: BuildEnvironment | None = None,
    relay: RelayOrder | None = None,
) -> Start:
    """Return the order of one node.

    Ranks of this node get all of this process's environment. Those of another get what ``forwarded_environment`` lets through, over what
    their own node has.

    Args:
        secret: the bootstrap of a rank.
        argv: what ranks execute ("spawn"); where it begins with an option, the interpreter of the node comes in front.
        has_sys_path: whether modules are found where this process finds them.
        environment: makes a rank's; the plan's facts alone by default.
    """
    node, build = plan.nodes[node_rank], environment or plan.rank_environment
    base = dict(os.environ) if node.is_local else forwarded_environment(config.environment)
    sys_path = tuple(map(os.path.abspath, sys.path)) if has_sys_path and node.is_local else ()
    if has_sys_path and not node.is_local:  # the node's interpreter has its own for the rest
        base["PYTHONPATH"] = os.pathsep.join([*program_paths(), *filter(None, [base.get("PYTHONPATH")])])
    command = (sys.executable if node.is_local else node.python, *argv) if argv[0].startswith("-") else tuple(argv)
    return Start(
        ranks=tuple(RankStart(place.rank, build(place.rank, base), secret(place.rank)) for place in plan.node_ranks(node_rank)),
        start_method=start_method,
        argv=command,
        preload=tuple(preload),
        cwd=cwd,
        sys_path=sys_path,
        log_dir=log_dir,
        log_policy=log_policy,
        kill_s=kill_s,
        has_own_environment=not node.is_local,
        relay=() if relay is None else (relay,),
    )
