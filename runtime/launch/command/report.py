"""``report.json``: how a launch ended, for programs that must know more than an exit code can say.

``cause.kind`` tells exit codes apart that a rank could have given itself:

    none            every rank ended with 0
    rank_exit       a rank ended with the code        rank_signal     a rank was ended by a signal
    start_failed    no rank could be started          node_lost       a node, or the agent of this one, is gone
    not_ready       ranks were not ready in time      timeout         --timeout has passed
    stopped         somebody sent a signal            output_closed   nobody reads standard output any longer
    error           anything else, which ``text`` says
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from .... import __version__
from ..plan import LaunchPlan

FORMAT = 1
CAUSES = (
    *("none", "rank_exit", "rank_signal", "start_failed", "node_lost", "not_ready", "timeout", "stopped", "output_closed"),
    "error",
)


def build_report(
    *,
    launch_id: str,
    exit_code: int,
    cause: Mapping[str, Any],
    argv: Sequence[str],
    plan: LaunchPlan | None = None,
    ends: Sequence[Mapping[str, Any]] = (),
    elapsed_s: float | None = None,
    log_dir: str | None = None,
    left: Sequence[int] = (),
) -> dict[str, Any]:
    """Return the report of a launch.

    Args:
        cause: ``kind``, of ``CAUSES``, and what is known beside it.
        plan: None where it failed before there was one.
        ends: of the ranks, such as ``RankEnd.as_dict`` gives them, in the order in which they came.
        left: pids that did not end even after SIGKILL.
    """
    if cause.get("kind") not in CAUSES:
        raise ValueError(f"cause {cause.get('kind')!r} is none of {', '.join(CAUSES)}")
    nodes = () if plan is None else plan.nodes
    return {
        "format": FORMAT,
        "version": __version__,
        "launch_id": launch_id,
        "argv": list(argv),
        "exit_code": exit_code,
        "cause": dict(cause),
        "elapsed_s": elapsed_s,
        "world_size": None if plan is None else plan.world_size,
        "nodes": [
            {"node_rank": rank, "host": node.name, "address": node.address, "is_local": node.is_local} for rank, node in enumerate(nodes)
        ],
        "ranks": [dict(end) for end in ends],
        "left": list(left),
        "log_dir": log_dir,
    }


def write_report(path: str, report: Mapping[str, Any]) -> str | None:
    """Write a report, whole or not at all; returns why it could not be: a launch ends the same way with it and without."""
    new = f"{path}.{secrets.token_hex(4)}"
    try:
        with open(new, "w") as file:
            json.dump(report, file, indent=2)
            file.write("\n")
        os.replace(new, path)
    except OSError as error:
        if os.path.exists(new):
            os.unlink(new)
        return f"the report {path} cannot be written: {error.strerror}"
    return None
