"""How the trace of a rank that shares no memory with the driver comes there: piece by piece, beside the steps.

A rank that is killed has told everything but its last moments, ``HANDOVER_S`` at most.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import BadFrameError
from .records import MAX_TRACE_BYTES, TraceEvents
from .trace_buffer import RECORD, RECORD_BYTES, TraceBuffer, TraceKind

HANDOVER_S = 0.5
_MAX_ROWS = MAX_TRACE_BYTES // RECORD_BYTES
_MOMENTS = (int(TraceKind.MARK), int(TraceKind.THREAD))  # complete once they are written


class TraceSender:
    """Cuts what is new in a buffer into ``TraceEvents``. One thread's."""

    def __init__(self, buffer: TraceBuffer) -> None:
        self._buffer = buffer
        self._num_sent = 0
        self._num_names = 1  # both sides begin with the same
        self._open = np.empty(0, np.int64)  # numbers of records that were sent before they were complete

    def take(self, *, is_last: bool = False) -> list[TraceEvents]:
        """Return what has been written or completed since the last time; with ``is_last`` one at least, the last of which says so."""
        end = self._buffer.num_written
        oldest = max(0, end - self._buffer.capacity + 1)
        told = self._open[self._open >= oldest]
        again = self._buffer.rows(told)
        is_filled = _is_complete(again)
        new = np.arange(max(self._num_sent, oldest), end)
        rows = self._buffer.rows(new)
        names = self._buffer.names()[self._num_names :]
        self._open = np.concatenate([told[~is_filled], new[~_is_complete(rows)]])
        self._num_sent, self._num_names = end, self._num_names + len(names)
        numbers, again = told[is_filled], again[is_filled]
        cuts = list(range(0, max(len(rows), len(again)), _MAX_ROWS)) or ([0] if is_last or names else [])
        return [
            TraceEvents(
                first=int(new[at]) if at < len(new) else end,
                rows=rows[at : at + _MAX_ROWS].tobytes(),
                filled_numbers=numbers[at : at + _MAX_ROWS].tobytes(),
                filled=again[at : at + _MAX_ROWS].tobytes(),
                names=tuple(names) if at == 0 else (),
                num_unnamed=self._buffer.num_unnamed,
                is_closed=is_last and at == cuts[-1],
            )
            for at in cuts
        ]


def take_over(buffer: TraceBuffer, told: TraceEvents) -> None:
    """Write what a rank has told into the driver's copy of its buffer.

    Raises:
        BadFrameError: rows that are cut, or without their numbers.
    """
    rows, filled = _rows(told.rows), _rows(told.filled)
    if len(told.filled_numbers) != 8 * len(filled):
        raise BadFrameError(f"{len(filled)} completed records of a trace with {len(told.filled_numbers)} B of numbers")
    numbers = np.frombuffer(told.filled_numbers, np.int64)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < max(told.first, 1):
        raise BadFrameError(f"completed records of a trace are numbered up to {numbers.max()}; those from {told.first} on are new")
    buffer.put(np.arange(told.first, told.first + len(rows)), rows)
    buffer.put(numbers[keep := numbers > buffer.num_written - buffer.capacity], filled[keep])
    for name in told.names:
        buffer.name_number(name)
    buffer.num_unnamed = told.num_unnamed
    if told.is_closed:
        buffer.close()


def _rows(data: bytes) -> npt.NDArray[np.void]:
    if len(data) % RECORD_BYTES:
        raise BadFrameError(f"{len(data)} B of a trace are no whole records of {RECORD_BYTES} B")
    return np.frombuffer(data, RECORD)


def _is_complete(rows: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    complete: npt.NDArray[np.bool_] = (rows["t1"] != 0) | np.isin(rows["kind"], _MOMENTS)
    return complete
