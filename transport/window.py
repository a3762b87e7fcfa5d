"""The credit window: how many published frames may be unacknowledged. Arithmetic only.

It bounds memory on both sides and is the only flow control: a frame is in flight from its publication until every rank has
acknowledged it.
"""

from __future__ import annotations

from collections import deque

from ..errors import AnswerLostError, InternalError, ProtocolError


class CreditWindow:
    """Counts acknowledgements of frames by ``num_ranks`` ranks, at most ``size`` frames in flight.

    Each rank acknowledges every frame once, in order. A frame left out is an AnswerLostError, anything else a ProtocolError; both name
    the rank.
    """

    def __init__(self, *, size: int, num_ranks: int) -> None:
        self.size = size
        self._next_ack = [0] * num_ranks  # by rank: the seq that it is to acknowledge next
        self._missing: deque[int] = deque()  # by frame in flight, oldest first: how many ranks have not acknowledged it
        self._oldest = 0

    @property
    def oldest(self) -> int:
        """The first frame that not every rank has acknowledged; the next to be published when none is in flight."""
        return self._oldest

    @property
    def in_flight(self) -> int:
        return len(self._missing)

    def opened(self, seq: int) -> None:
        """Note that frame ``seq`` was published."""
        if seq != self._oldest + len(self._missing):
            raise InternalError(f"frame {seq} published where {self._oldest + len(self._missing)} was due")
        self._missing.append(len(self._next_ack))

    def acknowledged(self, rank: int, seq: int) -> bool:
        """Note that ``rank`` has done frame ``seq``; returns whether that made room."""
        if not 0 <= rank < len(self._next_ack):
            raise ProtocolError(f"an acknowledgement of rank {rank}; the ranks are 0 to {len(self._next_ack) - 1}")
        due = self._next_ack[rank]
        if seq != due or seq >= self._oldest + len(self._missing):
            if due < seq < self._oldest + len(self._missing):
                raise AnswerLostError(
                    f"its answer to frame {due} was lost on the way: the next that came is to frame {seq}", rank=rank, seq=due
                )
            raise ProtocolError(f"rank {rank} acknowledged frame {seq} where {due} was due")
        self._next_ack[rank] = seq + 1
        self._missing[seq - self._oldest] -= 1
        made_room = False
        while self._missing and self._missing[0] == 0:
            self._missing.popleft()
            self._oldest += 1
            made_room = True
        return made_room

    def behind(self) -> list[int]:
        """Return the ranks that have not acknowledged the oldest frame in flight."""
        return [rank for rank, seq in enumerate(self._next_ack) if seq <= self._oldest] if self._missing else []

    def due(self, rank: int) -> int:
        """Return the frame that ``rank`` is to acknowledge next, published or not."""
        return self._next_ack[rank]

    def missing(self, seq: int) -> list[int]:
        """Return the ranks that have not acknowledged frame ``seq``."""
        return [rank for rank, due in enumerate(self._next_ack) if due <= seq]
