"""What a worker finds in ``self.ctx``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..transport.records import Progress
from ..transport.trace_spans import NO_TRACE, Trace

if TYPE_CHECKING:
    from .coordinator import Coordinator
    from .mesh import Mesh
    from .store_client import StoreClient

PROGRESS_PERIOD_S = 0.1


@dataclass(frozen=True)
class RankFacts:
    """Who this process is, as RFC 3587 has it: told once, never asked for again."""

    launch_id: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    host: str
    device: str


class HasRankFacts:
    """Base of what shows a rank's facts as its own attributes."""

    facts: RankFacts

    @property
    def launch_id(self) -> str:
        """The same string on all ranks, and no other launch's."""
        return self.facts.launch_id

    @property
    def rank(self) -> int:
        return self.facts.rank

    @property
    def world_size(self) -> int:
        return self.facts.world_size

    @property
    def local_rank(self) -> int:
        """This rank's place among those of its node, from 0."""
        return self.facts.local_rank

    @property
    def local_world_size(self) -> int:
        """How many ranks this node has."""
        return self.facts.local_world_size


@dataclass
class RankStatus:
    """What this rank is doing; the main thread writes, the heartbeat thread reads."""

    phase: str = "setup"
    seq: int = -1
    done_seq: int = -1
    step_id: int = -1
    done_step_id: int = -1


@dataclass
class WorkerContext(HasRankFacts):
    """Rank facts, the mesh with its communicators, and the store of the launch.

    Attributes:
        facts: rank, world size, device and the like; also reachable as ``ctx.rank`` and so on.
        mesh: ``ctx.mesh["tp"]`` is this rank's communicator on an axis (dp, pp, tp, ep, world).
        store: the coordinator's key-value store, shared by all ranks.
        trace: ``with ctx.trace.span("name"):`` shows a block on the timeline of ``launch(trace=FILE)``; next to nothing without one.
    """

    facts: RankFacts
    mesh: Mesh
    store: StoreClient
    _send_progress: Callable[[Progress], None]
    trace: Trace = NO_TRACE
    _progress_sent_at: float = field(default=0.0, init=False)
    _coordinator: Coordinator | None = field(default=None, init=False)

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:N"``."""
        return self.facts.device

    @property
    def coordinator(self) -> Coordinator:
        """The launch's coordinator: broadcasts and gathers of bytes, and barriers, over ``store``; made when it is first asked for."""
        if self._coordinator is None:
            from .store_coordinator import StoreCoordinator

            self._coordinator = StoreCoordinator(self.facts, self.store, name="worker", timeout_s=self.store.timeout_s)
        return self._coordinator

    def report_progress(self, done: int, total: int, what: str) -> None:
        """Tell the driver how far ``setup`` is, in any unit; sent at most ten times a second, and always at the end."""
        now = time.monotonic()
        if done >= total or now - self._progress_sent_at >= PROGRESS_PERIOD_S:
            self._progress_sent_at = now
            self._send_progress(Progress(done=done, total=total, what=what))
