"""Ranks that compute the same thing each for itself, and must come to the same bits.

A draft that several ranks run whole proposes on each of them, and a mixture's router picks experts on each rank that has the tokens, in
float32 or less. Where two candidates are nearly equal, other hardware may pick the other one: ranks would then hold different tokens, or a
token have an expert twice or not at all, and nobody would notice. (Sampling, which each tp rank does for itself too, works on equal logits
in float64, where other hardware differs by parts in 10^15.)
"""

from __future__ import annotations

from collections.abc import Sequence

from ...config import ParallelConfig
from ...errors import ConfigError
from .checkpoint import Checkpoint


def count_alike_ranks(checkpoint: Checkpoint, parallel: ParallelConfig) -> int:
    """Return how many neighbouring ranks must compute alike: all, those of a replica or a stage; 1 where each may be of its own kind."""
    num_alike = 1
    if checkpoint.model.mixture is not None:
        num_alike = parallel.tp if parallel.ep <= parallel.tp else parallel.world_size
    drafts = () if checkpoint.speculation is None else checkpoint.speculation.drafts
    of_replica = parallel.tp * parallel.pp
    return max(num_alike, of_replica if any(draft.tp < of_replica for draft in drafts) else 1)


def check_alike(processors: Sequence[str], num_alike: int) -> None:
    """Check what each rank says of its processor.

    Args:
        processors: as ``describe_processor`` returns it, by rank.
        num_alike: as ``count_alike_ranks`` returns it.

    Raises:
        ConfigError: ranks that must compute alike are of two kinds.
    """
    for rank, processor in enumerate(processors):
        first = rank - rank % num_alike
        if processor != processors[first]:
            raise ConfigError(
                f"rank {first} computes on {processors[first]!r} and rank {rank} on {processor!r}, which may differ in the last bits; "
                f"ranks {first} to {first + num_alike - 1} each pick experts or drafts for themselves and must pick alike: take hosts of "
                "one kind, set OMP_NUM_THREADS, or, for a draft without stages, give it the target's tp"
            )
