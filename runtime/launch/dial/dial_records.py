"""What a node that calls in and the driver tell each other, around the byte stream of the node's agent.

node -> driver    Call (first), Signalled, Ended
driver -> node    Accepted or Refused (first), Open, Finished, Cut, Farewell (last)
both              Chunk, with the bytes in a second part; Taken
"""

from __future__ import annotations

from dataclasses import dataclass

from ....transport.schema import Record, many, text, whole

_MAX_TEXT = 16 << 10
_MAX_RANKS = 1 << 16
_MAX_PID = 1 << 22
MAX_SLOTS = 4096


class DialRecord(Record, max_bytes=64 << 10):
    """Base of what passes over the connection of a node that called in."""


@dataclass(frozen=True)
class Call(DialRecord):
    """A node is there and waits for the driver.

    Args:
        version: of zspmd.
        node_rank: which node it says it is; 0 is the driver's own and never calls.
        num_slots: ranks that it takes.
        local_rank, local_world_size: of its first rank among all ranks on this machine, where another launcher has placed them.
        devices: the CUDA devices of its ranks; none for the CPU.
    """

    version: str = text(64)
    launch_id: str = text(64)
    node_rank: int = whole(_MAX_RANKS - 1)
    num_nodes: int = whole(_MAX_RANKS, 1)
    host: str = text(256)
    pid: int = whole(_MAX_PID, 1)
    num_slots: int = whole(MAX_SLOTS, 1, default=1)
    local_rank: int = whole(_MAX_RANKS - 1, default=0)
    local_world_size: int = whole(_MAX_RANKS, 1, default=1)
    devices: tuple[int, ...] = many(int, MAX_SLOTS, default=())


@dataclass(frozen=True)
class Signalled(DialRecord):
    """Somebody has sent the node's process a signal; it goes on until the driver ends the launch."""

    number: int = whole(64, 1)


@dataclass(frozen=True)
class Ended(DialRecord):
    """The agent has ended, after all that it said; ``reason`` says how."""

    reason: str = text(_MAX_TEXT)


@dataclass(frozen=True)
class Accepted(DialRecord):
    """The node is one of the launch; it starts its agent at ``Open``."""

    host: str = text(256)
    pid: int = whole(_MAX_PID, 1)


@dataclass(frozen=True)
class Refused(DialRecord):
    """The node is not one of the launch."""

    reason: str = text(_MAX_TEXT)


@dataclass(frozen=True)
class Open(DialRecord):
    """Start an agent, and carry its bytes."""


@dataclass(frozen=True)
class Finished(DialRecord):
    """The driver says no more to the agent: its input is at its end."""


@dataclass(frozen=True)
class Cut(DialRecord):
    """Have the agent find its driver gone at once; what it still says is lost."""


@dataclass(frozen=True)
class Farewell(DialRecord):
    """The launch has ended; the node's process ends with this exit code."""

    exit_code: int = whole(255)


@dataclass(frozen=True)
class Chunk(DialRecord):
    """The next bytes of the agent's stream; they are in the part behind it."""


@dataclass(frozen=True)
class Taken(DialRecord):
    """One more ``Chunk`` was passed on, so that another may be sent."""
