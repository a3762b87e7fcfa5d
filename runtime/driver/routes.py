"""By which sockets each rank of a launch reaches the driver: those of the run directory, TCP, or TCP with its steps through a relay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...transport.security import tcp_endpoint
from ..launch.plan import LaunchPlan


class NamesEndpoints(Protocol):
    """A run directory."""

    def endpoint(self, name: str) -> str: ...


class Routes:
    """Ranks of this node have the sockets of the run directory, those of others TCP. No I/O.

    Attributes:
        relayed: by node, the ranks of each whose agent takes the steps for all of them.

    Args:
        address: of the driver on TCP; None where no rank uses it.
        is_all_tcp: whether the ranks of this node use it too.
        relay_mode: ``NodesConfig.relay``.
    """

    def __init__(self, plan: LaunchPlan, address: str | None, *, is_all_tcp: bool = False, relay_mode: str = "off") -> None:
        self._plan = plan
        self._address = address
        self._on_tcp = [is_all_tcp or not plan.node_of(place.rank).is_local for place in plan.ranks]
        self._kinds = sorted(set(self._on_tcp), reverse=True)  # TCP first: its way is the longer one
        self.relayed: dict[int, tuple[int, ...]] = {}
        for node_rank, node in enumerate(plan.nodes):
            ranks = tuple(place.rank for place in plan.node_ranks(node_rank))
            if not node.is_local and _has_relay(relay_mode, len(ranks)):
                self.relayed[node_rank] = ranks

    @property
    def has_tcp(self) -> bool:
        return True in self._kinds

    def is_tcp(self, rank: int) -> bool:
        return self._on_tcp[rank]

    def is_relayed(self, rank: int) -> bool:
        return self._plan.ranks[rank].node_rank in self.relayed

    def endpoints(self, directory: NamesEndpoints, name: str) -> list[str]:
        """Return what the driver's end ``name`` is to bind."""
        return [tcp_endpoint(self._address or "") if is_tcp else directory.endpoint(name) for is_tcp in self._kinds]

    def endpoint(self, rank: int, bound: Sequence[str]) -> str:
        """Return which of the bound endpoints of an end is this rank's."""
        return bound[self._kinds.index(self._on_tcp[rank])]

    def step_endpoint(self, rank: int, bound: Sequence[str]) -> str:
        """Return where a rank takes its steps: from the driver, or from its node's relay."""
        return self.relay_endpoint(self._plan.ranks[rank].node_rank) if self.is_relayed(rank) else self.endpoint(rank, bound)

    def relay_endpoint(self, node_rank: int) -> str:
        """Return where the relay of a node publishes."""
        return f"ipc://{self._plan.nodes[node_rank].run_directory}/step"

    def upstream(self, bound: Sequence[str]) -> str:
        """Return which of the bound endpoints of the step socket relays connect to."""
        return bound[self._kinds.index(True)]


def _has_relay(mode: str, num_ranks: int) -> bool:
    from ..launch.nodes.relay import choose_relay  # what a launch on one node need not wait for

    return choose_relay(mode, num_ranks)
