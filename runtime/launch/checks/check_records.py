"""The outcome of one check of a machine, and how a driver asks another node for its own."""

from __future__ import annotations

from dataclasses import dataclass

from ....transport import schema
from ..agent_protocol import AgentRecord

OK, WARN, FAIL = "ok", "warn", "FAIL"
_MAX_TEXT = 1 << 16
_MAX_CHECKS = 256


@dataclass(frozen=True)
class Check(AgentRecord):
    """The outcome of one check; ``advice`` says what to mend, and is empty where nothing is to be.

    "ok", "warn" (a launch works, something that people do with it may not) or "FAIL" (no launch works).
    """

    name: str = schema.text(64)
    status: str = schema.text(4, choices=(OK, WARN, FAIL))
    text: str = schema.text(_MAX_TEXT)
    advice: str = schema.text(_MAX_TEXT, default="")


@dataclass(frozen=True)
class CheckMachine(AgentRecord):
    """Run every check of ``checks`` on this node; may take 10 s where GPUs do not answer."""


@dataclass(frozen=True)
class MachineChecks(AgentRecord):
    """What they said, in order."""

    checks: tuple[Check, ...] = schema.many(Check, _MAX_CHECKS)
