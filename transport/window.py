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

    Attributes:
        size: the limit, for whoever publishes.
        oldest: the first frame that not every rank has acknowledged; the next to be published when none is in flight.
        in_flight: how many are.
    """

    __slots__ = ("_missing", "_next_ack", "_num_ranks", "in_flight", "oldest", "size")

    def __init__(self, *, size: int, num_ranks: int) -> None:
        self.size = size
        self.oldest = 0
        self.in_flight = 0
        self._num_ranks = num_ranks
        self._next_ack = [0] * num_ranks  # by rank: the seq that it is to acknowledge next
        self._missing: deque[int] = deque()  # by frame in flight, oldest first: how many ranks have not acknowledged it

    def opened(self, seq: int) -> None:
        """Note that frame ``seq`` was published."""
        if seq != self.oldest + self.in_flight:
            raise InternalError(f"frame {seq} published where {self.oldest + self.in_flight} was due")
        self._missing.append(self._num_ranks)
        self.in_flight += 1

    def acknowledged(self, rank: int, seq: int) -> bool:
        """Note that ``rank`` has done frame ``seq``; returns whether that made room."""
        if not 0 <= rank < self._num_ranks:
            raise ProtocolError(f"an acknowledgement of rank {rank}; the ranks are 0 to {self._num_ranks - 1}")
        if seq != self._next_ack[rank] or seq >= self.oldest + self.in_flight:
            raise self._refusal(rank, seq)
        self._next_ack[rank] = seq + 1
        missing = self._missing
        missing[seq - self.oldest] -= 1
        if missing[0]:
            return False
        while missing and not missing[0]:
            missing.popleft()
            self.oldest += 1
            self.in_flight -= 1
        return True

    def _refusal(self, rank: int, seq: int) -> AnswerLostError | ProtocolError:
        due = self._next_ack[rank]
        if due < seq < self.oldest + self.in_flight:
            return AnswerLostError(
                f"its answer to frame {due} was lost on the way: the next that came is to frame {seq}", rank=rank, seq=due
            )
        return ProtocolError(f"rank {rank} acknowledged frame {seq} where {due} was due")

    def behind(self) -> list[int]:
        """Return the ranks that have not acknowledged the oldest frame in flight."""
        return [rank for rank, seq in enumerate(self._next_ack) if seq <= self.oldest] if self.in_flight else []

    def due(self, rank: int) -> int:
        """Return the frame that ``rank`` is to acknowledge next, published or not."""
        return self._next_ack[rank]

    def missing(self, seq: int) -> list[int]:
        """Return the ranks that have not acknowledged frame ``seq``."""
        return [rank for rank, due in enumerate(self._next_ack) if due <= seq]
