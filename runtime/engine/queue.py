"""Sequences that wait to run, oldest first, and which of them may."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator

from ...errors import InternalError
from .request import Sequence


class WaitingQueue:
    """Waiting sequences in the order of their age; all may start, unless ``admit_only`` has named the requests that may."""

    def __init__(self) -> None:
        self._ready: OrderedDict[str, Sequence] = OrderedDict()
        self._held: OrderedDict[str, Sequence] = OrderedDict()
        self._admitted: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self._ready) + len(self._held)

    def __iter__(self) -> Iterator[Sequence]:
        """Yield those that may start, then those that are held back."""
        yield from self._ready.values()
        yield from self._held.values()

    def get(self, sequence_id: str) -> Sequence | None:
        """Return a waiting sequence by its id."""
        return self._ready.get(sequence_id) or self._held.get(sequence_id)

    def first(self) -> Sequence | None:
        """Return the oldest that may start."""
        return next(iter(self._ready.values()), None)

    def append(self, sequence: Sequence) -> None:
        """Queue the youngest sequence."""
        self._queue_of(sequence)[sequence.sequence_id] = sequence

    def prepend(self, sequence: Sequence) -> None:
        """Queue a sequence that is older than all that wait with it."""
        queue = self._queue_of(sequence)
        queue[sequence.sequence_id] = sequence
        queue.move_to_end(sequence.sequence_id, last=False)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, as it starts or has ended."""
        del self._queue_of(sequence)[sequence.sequence_id]

    def admit_only(self, request_ids: Collection[str] | None) -> None:
        """From now on hold back all but the sequences of these requests; None lets all start."""
        self._admitted = None if request_ids is None else frozenset(request_ids)
        everyone = sorted(self, key=lambda sequence: sequence.age)
        self._ready.clear()
        self._held.clear()
        for sequence in everyone:
            self.append(sequence)

    def validate(self) -> None:
        """Check that each sequence is where it belongs, in the order of age; raises InternalError."""
        for queue in (self._ready, self._held):
            ages = [sequence.age for sequence in queue.values()]
            if ages != sorted(ages) or any(self._queue_of(sequence) is not queue for sequence in queue.values()):
                raise InternalError(f"waiting sequences are out of order or in the wrong queue: {list(queue)}")

    def _queue_of(self, sequence: Sequence) -> OrderedDict[str, Sequence]:
        return self._ready if self._admitted is None or sequence.request_id in self._admitted else self._held
