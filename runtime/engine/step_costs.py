"""What decode steps take: measured by the driver, which alone reads clocks, and published for the depth policy of the ranks."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from ...errors import InternalError
from ...transport.step_cost import CATCH_UP, MAX_DURATION_US, StepCost, batch_bucket

_MEMORY = 15  # measurements of which the median is taken, since a step that takes long by chance takes much longer
_STALE_AFTER = 256  # measurements of others, after which a cell forgets its own
_MIN_CHANGE = 0.05


@dataclass
class _Cell:
    durations_us: deque[int] = field(default_factory=lambda: deque(maxlen=_MEMORY))
    measured_at: int = 0
    published_us: int = 0

    def median_us(self) -> int:
        return statistics.median_low(self.durations_us)

    def is_changed(self) -> bool:
        return abs(self.median_us() - self.published_us) >= _MIN_CHANGE * self.published_us


class StepCosts:
    """Keeps what a step takes, for each size of batch and each depth, and says what has changed.

    Args:
        publish_every: calls of ``changes``, one a step, between reports of cells that moved. New cells are reported at once.
    """

    def __init__(self, publish_every: int = 16) -> None:
        self._cells: dict[tuple[int, int], _Cell] = {}
        self._publish_every = publish_every
        self._num_measured = 0
        self._num_quiet = 0  # calls of ``changes`` since cells were last looked at
        self._has_new = False

    def record(self, num_sequences: int, depth: int, duration_s: float, *, follows_change: bool) -> None:
        """Count a step without prompt chunks.

        Args:
            num_sequences: how many decoded, at least 1.
            depth: the K that the ranks chose.
            duration_s: from the answer before to this one's, where the ranks did not wait for the driver.
            follows_change: the first step with drafts after some without: its draft model had to catch up. Of these, which differ each
                time, the last is kept, as CATCH_UP.

        Raises:
            InternalError: no sequence, or a depth that ranks cannot choose.
        """
        if not 0 <= depth < CATCH_UP:
            raise InternalError(f"a step of depth {depth} came back; 0 to {CATCH_UP - 1} can be measured")
        key = batch_bucket(num_sequences), CATCH_UP if follows_change else depth
        cell = self._cells.get(key)
        if cell is None:
            cell = self._cells[key] = _Cell()
            self._has_new = True
        if follows_change or self._num_measured - cell.measured_at > _STALE_AFTER:
            cell.durations_us.clear()
        cell.durations_us.append(min(max(round(duration_s * 1e6), 1), MAX_DURATION_US))
        self._num_measured += 1
        cell.measured_at = self._num_measured

    def changes(self) -> list[StepCost]:
        """Return the cells that are new, or that moved by 5 % since they were last returned; called once a step."""
        self._num_quiet += 1
        if not self._has_new and self._num_quiet < self._publish_every:
            return []
        self._num_quiet, self._has_new = 0, False
        changed = [(key, cell) for key, cell in self._cells.items() if cell.is_changed()]
        for _, cell in changed:
            cell.published_us = cell.median_us()
        return [StepCost(bucket, depth, cell.published_us) for (bucket, depth), cell in changed]

    def reset(self) -> None:
        """Have every cell returned again: the ranks are new and know none."""
        for cell in self._cells.values():
            cell.published_us = 0
        self._has_new = bool(self._cells)
