"""What can be said of a rank from the driver's side: for errors, and for ``WorkerGroup.health``. Asks nobody."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from ...errors import WorkerStalledError
from .control import RankRecord
from .faults import RankIdentity
from .pending import PendingReply
from .statistics import RankHealth

STOPPED = "stopped"  # in the first line of a process's stacks, where the kernel has stopped it
_COLLECTIVES = ("workers/communicators/", "torch/distributed/")  # files that a rank is in while it waits for its peers


class RankReports:
    """Describes ranks from their records and log tails.

    Args:
        records: by rank, kept up to date by the control hub.
        log_tail: returns the last lines that a rank printed.
    """

    def __init__(self, records: Callable[[], Sequence[RankRecord]], log_tail: Callable[[int], list[str]]) -> None:
        self._records = records
        self._log_tail = log_tail
        self.step_of = self._beat_step  # the group knows better: what a rank has acknowledged is newer than its last beat

    def identity(self, rank: int) -> RankIdentity:
        """Return where a rank runs and the step it began last, as far as is known."""
        record = self._records()[rank]
        return RankIdentity(record.host, record.pid, self.step_of(rank))

    def health(self) -> list[RankHealth]:
        """Return what each rank last said of itself."""
        return [self._health(record) for record in self._records()]

    def overdue(self, pending: PendingReply, missing: Sequence[int], waited_s: float, stacks: Mapping[int, str]) -> WorkerStalledError:
        """Return the error of a step or call that ``missing`` ranks have not done within ``waited_s``.

        It blames a rank that is stopped before others, and one that waits for its peers in a collective last; else the one furthest behind.
        """
        what = "the call" if pending.step_id is None else f"step {pending.step_id}"
        listed = ", ".join(self._describe(rank) for rank in missing)
        behind = min(missing, key=lambda rank: (_suspicion(stacks.get(rank, "")), self._last_seq(rank)))
        return self._stalled(behind, f"no answer to {what} within {waited_s:.3g} s; not done with it: {listed}", missing, stacks)

    def not_ended(self, rank: int, drain_s: float) -> WorkerStalledError:
        """Return the error of a rank that had to be ended by signals."""
        return self._stalled(rank, f"did not end within {drain_s:g} s of STOP and was ended by zspmd", [rank])

    def progress(self, rank: int, *, has_subscribed: bool) -> str:
        """Say how far a rank's start is."""
        record = self._records()[rank]
        if record.connection is None:
            return "has not said hello" + (f" (pid {record.pid})" if record.pid else " (no process)")
        if not has_subscribed:
            return f"(pid {record.pid}) has not subscribed"
        progress = f" at {record.progress.done} of {record.progress.total} {record.progress.what}" if record.progress else ""
        return f"(pid {record.pid}) is in its {record.beat.phase if record.beat else 'setup'}{progress}"

    def _stalled(self, rank: int, message: str, missing: Sequence[int], stacks: Mapping[int, str] | None = None) -> WorkerStalledError:
        where = self.identity(rank)
        return WorkerStalledError(
            message,
            missing=missing,
            stacks=stacks,
            rank=rank,
            host=where.host,
            pid=where.pid,
            step_id=where.step_id,
            log_tail=self._log_tail(rank),
        )

    def _last_seq(self, rank: int) -> int:
        """Return the last frame that a rank is known to have begun."""
        beat = self._records()[rank].beat
        return -1 if beat is None else beat.seq

    def _beat_step(self, rank: int) -> int | None:
        beat = self._records()[rank].beat
        return beat.step_id if beat is not None and beat.step_id >= 0 else None

    def _health(self, record: RankRecord) -> RankHealth:
        beat, age = record.beat, None if record.beat_at is None else time.monotonic() - record.beat_at
        if beat is None:
            return RankHealth(record.rank, "starting", record.pid, record.host, -1, -1, None, 0)
        return RankHealth(
            record.rank,
            beat.phase,
            record.pid,
            record.host,
            beat.step_id,
            beat.done_step_id,
            age,
            beat.memory_bytes,
            beat.foreign_frames,
            beat.duplicate_frames,
            beat.gaps,
        )

    def _describe(self, rank: int) -> str:
        health = self._health(self._records()[rank])
        beat = "no beat yet" if health.beat_age_s is None else f"last beat {health.beat_age_s:.1f} s ago"
        return f"rank {rank} (pid {health.pid}, phase {health.phase}, {beat})"


def _suspicion(stack: str) -> int:
    """Rank what a process is doing by how likely it keeps the others waiting; the likeliest first."""
    if STOPPED in stack.partition("\n")[0]:
        return 0
    return 2 if any(place in stack for place in _COLLECTIVES) else 1
