"""What a scheduler has counted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SchedulerStatistics:
    """Counts now (running, waiting, steps, blocks) and since the start (all others).

    ``num_prefix_queries`` counts tokens of admitted sequences, ``num_prefix_hits`` those among them that came from shared blocks,
    ``num_discarded`` tokens that were sampled for sequences already finished, ``num_restarts`` how often the ranks were replaced.
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
