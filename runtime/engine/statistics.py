"""What a scheduler has counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpeculationStatistics:
    """What speculation did since the start.

    Attributes:
        num_steps: steps in which drafts were asked for; ``num_rows`` is the sequences that these steps decoded.
        drafted, accepted: by position, how many drafts were verified there and how many of these were kept.
        propose_s, target_s: seconds that the ranks took to propose, and to compute and verify, in steps that decoded; those of the
            first rank of each replica, in sum.
    """

    num_steps: int
    num_rows: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    propose_s: float
    target_s: float

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a sequence gained on average in a step in which drafts were asked for; 1 is as many as without."""
        return 1 + sum(self.accepted) / max(1, self.num_rows)


@dataclass(frozen=True)
class SchedulerStatistics:
    """Counts now (running, waiting, steps, blocks) and since the start (all others).

    ``num_prefix_queries`` counts tokens of admitted sequences, ``num_prefix_hits`` those among them that came from shared blocks,
    ``num_discarded`` tokens that were sampled for sequences already finished, ``num_restarts`` how often the ranks were replaced.
    ``speculation`` is for the engine to fill in; None where nothing is proposed.
    """

    num_running: int
    num_waiting: int
    num_steps_in_flight: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_preemptions: int
    num_computed_tokens: int
    num_generated_tokens: int
    num_discarded: int
    num_restarts: int
    speculation: SpeculationStatistics | None = None
