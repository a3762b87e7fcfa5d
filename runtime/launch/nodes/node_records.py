"""What a driver and the agents of other nodes tell each other beside ``agent_protocol``: before ranks are started, and that they live.

driver -> agent   Attach (first), Ping, Examine, Listen, Reach, Prepare
agent -> driver   Pong, NodeFacts, Listening, Reached, Prepared, RelayLost

``Examine`` and ``NodeFacts`` are in ``node_facts``.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....transport.schema import blob, many, number, text, whole
from ..agent_protocol import MAX_RANKS, AgentRecord

_MAX_TEXT = 1 << 20
_MAX_SECONDS = 1e6
_MAX_NUMBER = (1 << 53) - 1
_MAX_NS = (1 << 63) - 1


@dataclass(frozen=True)
class Attach(AgentRecord):
    """The first record to an agent of another node: it ends everything when it has heard nothing for ``lease_s``."""

    lease_s: float = number(0, _MAX_SECONDS)


@dataclass(frozen=True)
class Ping(AgentRecord):
    """A beat of the driver's; the answer to it is the agent's, and tells its clock."""

    number: int = whole(_MAX_NUMBER)


@dataclass(frozen=True)
class Listen(AgentRecord):
    """Let the other nodes prove that they reach this one at ``address``, until ``Start`` or the next ``Listen``."""

    address: str = text(256)


@dataclass(frozen=True)
class Reach(AgentRecord):
    """Connect to the listeners of other nodes, each "ADDRESS PORT", and have ``nonce`` back from them."""

    targets: tuple[str, ...] = many(str, MAX_RANKS)
    nonce: bytes = blob(64)
    timeout_s: float = number(0, _MAX_SECONDS)


@dataclass(frozen=True)
class Prepare(AgentRecord):
    """Make the run directory of a launch on this node, and hold its master port where ``master_addr`` is not empty.

    ``master_port`` is 0 for one that follows from the launch id.
    """

    launch_id: str = text(64)
    node_rank: int = whole(MAX_RANKS - 1)
    master_addr: str = text(256, default="")
    master_port: int = whole(65_535, default=0)


@dataclass(frozen=True)
class Pong(AgentRecord):
    """The answer to the ``Ping`` of that number, with this node's monotonic clock in nanoseconds."""

    number: int = whole(_MAX_NUMBER)
    monotonic_ns: int = whole(_MAX_NS)


@dataclass(frozen=True)
class Listening(AgentRecord):
    """The port of a listener, or why there is none."""

    port: int = whole(65_535, default=0)
    error: str = text(_MAX_TEXT, default="")


@dataclass(frozen=True)
class Reached(AgentRecord):
    """For each target, in their order: why it was not reached, or nothing."""

    errors: tuple[str, ...] = many(str, MAX_RANKS)


@dataclass(frozen=True)
class Prepared(AgentRecord):
    """Where the run directory is and which port is held, or why not."""

    run_directory: str = text(_MAX_TEXT, default="")
    master_port: int = whole(65_535, default=0)
    error: str = text(_MAX_TEXT, default="")


@dataclass(frozen=True)
class RelayLost(AgentRecord):
    """The connection by which this node takes its steps broke: what was on its way is lost."""

    reason: str = text(_MAX_TEXT)
