"""The place of this command where it is one of several that call each other: ``--external``, or ``--node-rank`` with ``--nnodes``."""

from __future__ import annotations

import argparse
import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from ....config import Deadlines
from ....errors import ConfigError, TopologyError
from .host_options import ManualNode
from .option_values import read_port, read_seconds
from .rank_counts import RankCounts

if TYPE_CHECKING:
    from ..dial.dial_place import DialPlace


def read_place(
    arguments: argparse.Namespace, manual: ManualNode | None, counts: RankCounts, environment: MutableMapping[str, str] | None = None
) -> DialPlace | None:
    """Return the place, or None where this command starts everything; the secret is taken out of the environment.

    Raises:
        ConfigError: no other launcher, or no secret where one is needed.
        TopologyError: another number of ranks than the launcher has started.
    """
    if manual is None and not arguments.external:
        return None
    from ..dial.dial_keys import take_secret  # what other launches need not wait for
    from ..dial.dial_place import external_place, manual_place
    from ..dial.external import read_external

    lease_s = read_seconds("--node-timeout", arguments.node_timeout, Deadlines.lease_s)
    variables = os.environ if environment is None else environment
    if manual is not None:
        if arguments.num_ranks is not None:
            raise ConfigError("-n counts the ranks of all nodes, and this command knows its own alone; give --nproc-per-node")
        secret = take_secret(variables, manual.secret_file)
        return manual_place(
            node_rank=manual.node_rank,
            num_nodes=manual.num_nodes,
            num_slots=counts.total or 1,
            master_addr=manual.master_addr,
            port=manual.master_port or None,
            secret=secret,
            launch_id=arguments.launch_id,
            lease_s=lease_s,
        )
    rank = read_external(variables)
    if counts.is_asked and counts.total != rank.world_size:
        raise TopologyError(f"{counts.total} ranks are asked for, and {rank.launcher} has started {rank.world_size}; leave the number out")
    return external_place(
        rank,
        variables,
        secret=take_secret(variables, arguments.secret_file),
        launch_id=arguments.launch_id,
        master_addr=arguments.master_addr or "",
        port=read_port(arguments.master_port) or None,
        lease_s=lease_s,
    )


def count_called(arguments: argparse.Namespace, place: DialPlace | None, counts: RankCounts) -> RankCounts:
    """Return how many ranks a program has in all, where nodes call in.

    Raises:
        ConfigError: nobody says it.
    """
    if place is None:
        return counts
    if not arguments.external and all(getattr(arguments, axis) is None for axis in ("tp", "pp", "dp")):
        raise ConfigError("a program needs to know how many ranks all nodes have together; give --tp, and each node its --nproc-per-node")
    total = place.num_nodes if arguments.external else None
    return RankCounts(None, total, None, is_asked=total is not None)
