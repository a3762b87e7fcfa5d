"""What the end of a script's launch comes to: its exit code, what to tell the user, and the report. No I/O but the report's file."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import LaunchError, NodeLostError
from ..launch.command.exit_codes import NODE_LOST, TIMED_OUT
from ..launch.command.options import ScriptOptions
from ..launch.command.report import build_report, write_report
from ..launch.plan import LaunchPlan
from .script_faults import RankEnd, cause_of, exit_code_of, first_cause, summarise, summarise_loss


@dataclass(frozen=True)
class ScriptEnd:
    """All that is known once nothing of a launch is left, or as little as could be reached.

    Attributes:
        plan: None where the launch was ended before there was one.
        signals: that asked for the end, in their order.
        error: of a node, or of processes that did not end.
        is_overdue: ``--timeout`` has passed.
        elapsed_s: since the start of the ranks; ``cleanup_s`` since the first of them ended.
        left: pids that did not end.
    """

    options: ScriptOptions
    plan: LaunchPlan | None
    ends: Sequence[RankEnd]
    signals: Sequence[int] = ()
    error: LaunchError | NodeLostError | None = None
    is_overdue: bool = False
    elapsed_s: float = 0.0
    cleanup_s: float = 0.0
    left: Sequence[int] = ()

    @property
    def cause(self) -> RankEnd | None:
        """The rank whose own failure has ended the launch. A node that is lost explains what a lost peer explains."""
        end = first_cause(self.ends)
        return end if end is not None and end.severity < (1 if isinstance(self.error, NodeLostError) else 2) else None

    @property
    def lost(self) -> NodeLostError | None:
        """The loss of a node among several that has ended the launch."""
        is_lost = isinstance(self.error, NodeLostError) and self.plan is not None and len(self.plan.nodes) > 1
        return self.error if is_lost and self.cause is None and isinstance(self.error, NodeLostError) else None

    @property
    def exit_code(self) -> int | None:
        """The code of the launch; None where ``error`` is to be raised."""
        if self.cause is not None:
            return exit_code_of(self.cause)
        if self.lost is not None:
            return NODE_LOST
        if self.is_overdue:
            return TIMED_OUT
        if self.signals:
            return 128 + self.signals[0]
        return None if self.error is not None else 0

    def summary(self) -> str | None:
        """Return what to tell the user; None where an exit code, or the error, says it all."""
        if self.cause is not None:
            told = summarise(
                self.cause,
                self.ends,
                host=socket.gethostname(),
                log_dir=self.options.log_dir,
                tail=self.options.tail,
                cleanup=self._cleanup() if self.plan is not None and len(self.plan.nodes) > 1 else None,
                report=self.options.report,
            )
            return told if self.error is None else f"{told}\n  and          {self.error}"
        if self.lost is not None:
            facts = {"cleanup": self._cleanup(), "logs": self.options.log_dir, "report": self.options.report}
            return summarise_loss(str(self.lost), NODE_LOST, self.ends, facts)
        return None

    def write_report(self) -> str | None:
        """Write the report that the options ask for; returns why it could not be. That of an error is written by whoever catches it."""
        if self.options.report is None or self.exit_code is None:
            return None
        report = build_report(
            launch_id=self.options.launch_id,
            exit_code=self.exit_code,
            cause=self._cause(),
            argv=sys.argv,
            plan=self.plan,
            ends=[end.as_dict() for end in self.ends],
            elapsed_s=round(self.elapsed_s, 6),
            log_dir=self.options.log_dir,
            left=self.left,
        )
        return write_report(self.options.report, report)

    def _cause(self) -> dict[str, Any]:
        if self.cause is not None:
            return cause_of(self.cause)
        if self.lost is not None:
            return {"kind": "node_lost", "host": self.lost.host, "ranks": list(self.lost.ranks), "text": str(self.lost)}
        if self.is_overdue:
            return {"kind": "timeout", "timeout_s": self.options.timeout_s}
        if self.signals:
            name = signal.Signals(self.signals[0]).name
            return {"kind": "output_closed" if name == "SIGPIPE" else "stopped", "signal": name}
        return {"kind": "none"}

    def _cleanup(self) -> str:
        world_size = self.plan.world_size if self.plan is not None else len(self.ends)
        left = f"; pids {', '.join(map(str, self.left))} are left" if self.left else ""
        return f"{len(self.ends)}/{world_size} ranks gone in {self.cleanup_s:.2f} s{left}"
