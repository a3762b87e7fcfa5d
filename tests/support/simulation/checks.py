"""What must hold in every run, whatever goes wrong in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zspmd.errors import (
    AnswerLostError,
    BackpressureError,
    ClosedError,
    LaunchError,
    NodeLostError,
    ProtocolError,
    ReadyTimeoutError,
    WorkerError,
    WorkerExitedError,
    WorkerRaisedError,
    WorkerStalledError,
    ZspmdError,
)
from zspmd.runtime.driver.faults import SETTLE_S
from zspmd.runtime.driver.watch import LOST_S
from zspmd.transport.frames import Buffer, ResultFrame, StepFrame, StepKind

from .options import AT_STOP, DEADLY

if TYPE_CHECKING:
    from zspmd.runtime.driver.group import WorkerGroup
    from zspmd.runtime.driver.launching import GroupConfig

    from .launch import SimulatedLaunch

NOTICED_S = 0.4  # after a failure at the latest: agent, network, and a rank's own last words
SLACK_S = 0.1  # of a deadline: the loop's own turns
REMINDER_S = 8.0  # until the next of them, at most, where those before were lost too
STARVING_LOSSES = 2  # of messages to a rank, one of them a reminder, until a wait may be too short
RANK_ENDS = (*DEADLY, "killed_at_start", "killed_in_setup", "raised_in_setup", "frame_refused")
RAISED = ("raised", "raised_in_setup", "raised_in_teardown", "frame_refused")
BROKEN_ANSWERS = ("answer_lost", "answer_doubled", "answer_garbled")
OWN_STALLS = ("hung", "hung_with_lock", "stopped", "stopped_for", "hung_in_setup", "ignored_stop", "ignored_signals")
EXPLAINED_BY: dict[type[BaseException], tuple[str, ...]] = {
    AnswerLostError: ("answer_lost",),
    ProtocolError: BROKEN_ANSWERS,
    NodeLostError: ("agent_killed",),
    BackpressureError: ("pipe_full",),
}


class Checks:
    """Is told what the group publishes, what ranks take, and what callers get; as a ``GroupRecorder`` it sees it as it is sent."""

    path = ""

    def __init__(self, launch: SimulatedLaunch) -> None:
        self._launch = launch
        self._world = launch.world
        self._published: list[tuple[StepKind, bytes]] = []
        self._taken = Counter[int]()
        self._group: WorkerGroup | None = None
        self._all_ranks = range(launch.options.num_ranks)
        self.fault_at: float | None = None
        self.closing_at: float | None = None
        self.told: list[BaseException] = []

    def watch(self, group: WorkerGroup) -> None:
        """Name the group that is checked."""
        self._group = group

    # the recorder

    def starting(self, config: GroupConfig, epoch: int, worker_args: Any, *, omp_num_threads: str) -> None:
        return

    def published(self, kind: StepKind, seq: int, body: Buffer, buffers: Sequence[Buffer]) -> None:
        self._world.note(f"publishes {kind.name} {seq}")
        if seq != len(self._published):
            self._world.violate(f"frame {seq} was published where {len(self._published)} was due")
        self._published.append((kind, bytes(body)))
        assert self._group is not None
        kept = len(self._group._processes.publisher._kept)
        if kept > self._launch.options.window + 1:  # STOP goes beyond it; SYNC comes alone
            self._world.violate(f"{kept} frames are kept for a window of {self._launch.options.window}")

    def answered(self, frame: ResultFrame) -> None:
        self._world.note(f"gets {frame.kind.name} {frame.seq} of rank {frame.rank}")

    def failed(self, error: ZspmdError) -> None:
        self._world.reach(f"group_fault_{type(error).__name__}")
        self.fault_at = self._world.now

    def close(self) -> None:
        return

    # ranks

    def taken(self, rank: int, frame: StepFrame) -> None:
        """A rank begins a frame: the next one, and what was published under that number."""
        if frame.seq != self._taken[rank]:
            self._world.violate(f"rank {rank} takes frame {frame.seq} where {self._taken[rank]} was due")
        self._taken[rank] = frame.seq + 1
        if frame.seq >= len(self._published) or self._published[frame.seq] != (frame.kind, bytes(frame.body)):
            self._world.violate(f"rank {rank} takes a frame {frame.seq} that was not published so")

    # callers

    def within(self, what: str, started: float, limit_s: float) -> None:
        """An await that began at ``started`` has ended: within its limit, and what a paused driver adds to it."""
        took_s = self._world.now - started
        if took_s > limit_s + 3 * self._world.paused_s + SLACK_S:
            self._world.violate(f"{what} took {took_s:.3f} s; its limit is {limit_s:.3f} s")

    def got_error(self, what: str, error: BaseException, waited_s: float, patience_s: float) -> None:
        """A request has raised: something that is true of this run."""
        name = type(error).__name__
        self._world.reach(f"request_{name}")
        self.told.append(error)
        group = self._group
        assert group is not None
        if isinstance(error, WorkerStalledError) and error is not group.fault:
            self._check_stalled(what, error, waited_s, patience_s)
        elif isinstance(error, BackpressureError) and error is not group.fault:
            has_waited = waited_s >= self._launch.options.deadlines.step_s
            if not (has_waited and self._may_stall(self._all_ranks, self._world.now - waited_s)) and not self._has_reached("pipe_full"):
                self._world.violate(f"{what}: {error!r} after {waited_s:.3f} s")
        elif isinstance(error, ClosedError):
            if self.closing_at is None:
                self._world.violate(f"{what}: {error!r}, and nobody has closed the group")
        elif error is not group.fault:
            self._world.violate(f"{what}: {error!r} is not the group's fault {group.fault!r}")

    def _check_stalled(self, what: str, error: WorkerStalledError, waited_s: float, patience_s: float) -> None:
        if waited_s < patience_s:
            self._world.violate(f"{what}: stalled after {waited_s:.3f} s of {patience_s:.3f} s")
        if error.rank not in error.missing:
            self._world.violate(f"{what}: rank {error.rank} is blamed and not missing")
        doing = {rank: text.splitlines()[-1] for rank, text in error.stacks.items() if rank in error.missing}
        stopped = [rank for rank, text in doing.items() if "stopped" in text]
        keeps_others = [rank for rank, text in doing.items() if text in ("hung", "busy") or "stopped" in text]
        if (stopped and error.rank not in stopped) or (keeps_others and doing.get(error.rank) == "waiting"):
            self._world.violate(f"{what}: rank {error.rank} is blamed for a stall, while they were {doing}")
        if patience_s >= 1.0 and not self._may_stall(error.missing, self._world.now - waited_s):
            self._world.violate(f"{what}: {error.args[0]}, and nothing had stalled")

    def _may_stall(self, ranks: Sequence[int], since: float) -> bool:
        """Whether something kept these ranks from their work, or their answers from the driver; that some were lost once does not."""
        starving = 1 if self._world.paused_s else STARVING_LOSSES  # a driver that is paused sends no reminder
        is_starving = self._launch.num_lost(ranks, since - REMINDER_S) >= starving
        return is_starving or bool(self._world.roots) or self._has_reached(*OWN_STALLS, *BROKEN_ANSWERS)

    def start_failed(self, error: BaseException, waited_s: float) -> None:
        """The start has raised."""
        self._world.reach(f"start_{type(error).__name__}")
        self.told.append(error)
        if isinstance(error, ReadyTimeoutError):
            if waited_s < self._launch.options.deadlines.ready_s or not self._may_stall(error.missing, 0.0):
                self._world.violate(f"start: {error} after {waited_s:.3f} s")
        elif isinstance(error, LaunchError):
            if not self._has_reached("agent_killed"):
                self._world.violate(f"start: {error!r}")
        elif isinstance(error, ClosedError):
            if self.closing_at is None:
                self._world.violate(f"start: {error!r}")
        else:
            self.check_fault(error)

    def close_raised(self, error: BaseException) -> None:
        """``aclose`` has raised."""
        self._world.reach(f"close_{type(error).__name__}")
        self.told.append(error)
        self.check_fault(error)

    # the end

    def ended(self, group: WorkerGroup) -> None:
        """The group is closed: nothing is left, every failure was told, and the right one is blamed."""
        if group.fault is not None:
            self.check_fault(group.fault)
            is_of_interest = not self._launch.options.abort and not self._has_reached("start_cancelled")
            if is_of_interest and not any(error is group.fault for error in self.told):
                self._world.violate(f"nobody was told of {group.fault!r}")
        for rank in self._launch.ranks:
            if rank.is_alive:
                self._world.violate(f"rank {rank.rank} lives on, {rank.doing}")
        if not self._launch.run_directory.is_removed:
            self._world.violate("the run directory is there")
        num_open, num_readers = self._launch.network.num_open, self._launch.loop.num_readers
        if num_open or num_readers:
            self._world.violate(f"{num_open} sockets and {num_readers} readers are left")
        if self._launch.loop.live_timers:
            self._world.violate(f"timers are left that ring at {self._launch.loop.live_timers} s")
        for complaint in self._launch.loop.complaints:
            self._world.violate(f"the loop complains: {complaint}")
        self._check_promptness()

    def check_fault(self, error: BaseException) -> None:
        """A first cause must have happened, and a rank's before all others but those of the same moment."""
        if isinstance(error, WorkerStalledError):
            has_been_slow = self._has_reached("slowed")  # for longer than it is left to end
            if self.closing_at is None or not (has_been_slow or self._may_stall(self._all_ranks, 0.0)):
                self._world.violate(f"{error!r} as the cause, and nothing had stalled")
        elif isinstance(error, WorkerError):
            self._check_blame(error)
        elif not self._has_reached(*EXPLAINED_BY.get(type(error), ())):
            self._world.violate(f"{error!r} is the cause; what happened is {self._world.roots}")

    def _check_blame(self, error: WorkerError) -> None:
        failed = [root for root in self._world.roots if root.what in (*RANK_ENDS, *AT_STOP)]
        kinds = RAISED if isinstance(error, WorkerRaisedError) else (*RANK_ENDS, *AT_STOP)
        blamed_at = [root.at for root in failed if root.rank == error.rank and root.what in kinds]
        if not blamed_at:
            self._world.violate(f"{error.args[0]} of rank {error.rank} is the cause; what happened is {self._world.roots}")
        elif min(blamed_at) > min(root.at for root in failed) + SETTLE_S + NOTICED_S + self._world.paused_s:
            self._world.violate(f"{error.args[0]} of rank {error.rank} is the cause; others failed earlier: {self._world.roots}")
        if isinstance(error, WorkerExitedError):
            code = next(rank.exit_code for rank in self._launch.ranks if rank.rank == error.rank)
            if error.exit_code != code:
                self._world.violate(f"rank {error.rank} is said to have exited with {error.exit_code}; it was {code}")

    def _check_promptness(self) -> None:
        """A failure must have become the group's in time, unless the group was closing or had failed already."""
        seen_at = min(at for at in (self.fault_at, self.closing_at, self._world.now) if at is not None)
        for root in self._world.roots:
            limit_s = self._limit_s(root.what)
            if seen_at > root.at + limit_s + 2 * self._world.paused_s:
                self._world.violate(f"{root} was seen {seen_at - root.at:.3f} s later")

    def _limit_s(self, what: str) -> float:
        """Return how long a failure may stay unseen."""
        if what in (*RANK_ENDS, "answer_doubled", "answer_garbled", "agent_killed"):
            return 1.0
        beats = self._launch.options.lose_beats == 0 and not self._has_reached(*OWN_STALLS)
        if what == "answer_lost" and beats and self._has_reached("ready"):
            return LOST_S + 3 * self._launch.options.deadlines.beat_s  # until a beat tells, twice, and the watch looks
        return math.inf

    def _has_reached(self, *counters: str) -> bool:
        return any(self._world.reached[counter] for counter in counters)
