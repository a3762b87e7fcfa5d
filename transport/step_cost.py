"""What a step was measured to take, as the driver publishes it and every rank reads it."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import InternalError

CATCH_UP = 255  # stands in place of a depth: the first step with drafts after steps without, in which the draft model catches up
MAX_DURATION_US = (1 << 32) - 1


class StepCost(NamedTuple):
    """A cell of the cost table.

    Args:
        bucket: how many sequences decode, as ``batch_bucket`` says.
        depth: tokens proposed for each of them, or CATCH_UP.
        duration_us: what such a step takes, 1 to MAX_DURATION_US.
    """

    bucket: int
    depth: int
    duration_us: int


def batch_bucket(num_sequences: int) -> int:
    """Return the bucket of so many sequences, by powers of two: 0 for 1, 1 for 2, 2 for 3 and 4, ...; raises InternalError below 1."""
    if num_sequences < 1:
        raise InternalError(f"a step of {num_sequences} decoding sequences; it has a cost only from 1 on")
    return (num_sequences - 1).bit_length()
