"""Numbers of ranks and devices as short as they can be told: 0-3,5."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby


def fold_numbers(numbers: Iterable[int]) -> str:
    """Return ascending numbers with their runs folded."""
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    folded = []
    for _, run in runs:
        members = [number for _, number in run]
        folded.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(folded)
