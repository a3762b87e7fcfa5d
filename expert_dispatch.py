"""How tokens meet the experts that several replicas share: the choice between the two ways. Standard library only.

    gather       every rank gets all tokens: all-gather, reduce-scatter              2 (R - 1) rows a token of its replica
    all_to_all   a rank gets the tokens of its experts: counts, rows, parts back     2 min(k, N) (N - 1) / (N tp) rows at most

So many rows of the hidden size each rank moves: R replicas of tp ranks share the experts, N = R tp ranks in all, and a token goes to k of
them. A gather counts every replica's tokens as those of the one with the most, since rows are padded; a token is sent once to a rank,
however many of its experts are there. An all-to-all moves less in most layouts, but it takes three exchanges for two and has rows to pick
out, so that it must save something to be worth it.
"""

from __future__ import annotations

from collections.abc import Sequence

from .config import ParallelConfig
from .errors import ConfigError
from .mixture_config import MixtureConfig

MIN_SAVED_BYTES = 1 << 20
"""Of what a rank moves: with less an all-to-all is no faster. It broke even between 130 and 400 KiB on CPUs, see the log."""


def can_gather(parallel: ParallelConfig) -> bool:
    """Return whether the replicas that share experts have an axis of their own: all of them, or ones of a single rank."""
    return parallel.ep == parallel.dp * parallel.tp or parallel.tp == 1


def check_dispatch(asked: str, mixture: MixtureConfig | None, parallel: ParallelConfig) -> None:
    """Check ``EngineConfig.expert_dispatch`` against the layout.

    Raises:
        ConfigError: a way is asked for, and replicas share no experts; or to gather over some of the replicas, of several ranks each.
    """
    if asked != "auto" and (mixture is None or parallel.ep <= parallel.tp):
        raise ConfigError(f"expert_dispatch is {asked!r}, and no replicas share experts: leave it out, or set ep to dp times tp")
    if asked == "gather" and not can_gather(parallel):
        raise ConfigError(
            f"expert_dispatch is 'gather', and ep {parallel.ep} is {parallel.ep // parallel.tp} of {parallel.dp} replicas of tp "
            f"{parallel.tp}; choose all_to_all, or ep {parallel.dp * parallel.tp} for all replicas"
        )


def is_all_to_all(num_tokens: Sequence[int], *, num_ranks: int, tp: int, top_k: int, row_bytes: int) -> bool:
    """Return whether an all-to-all is the better way in a step: the same on every rank, since it follows from the step alone.

    Args:
        num_tokens: of each replica.
        num_ranks: N.
        row_bytes: of a token's hidden state.
    """
    longest = max(num_tokens)
    gathered = 2 * (num_ranks // tp - 1) * longest
    sent = 2 * min(top_k, num_ranks) * (num_ranks - 1) * -(-longest // tp) / num_ranks
    return (gathered - sent) * row_bytes >= MIN_SAVED_BYTES
