"""The credit window against a plain model of it, over any order of publications and acknowledgements."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zspmd.errors import AnswerLostError, ProtocolError
from zspmd.transport.window import CreditWindow


class WindowMachine(RuleBasedStateMachine):
    """``acks`` has how many frames each rank has acknowledged."""

    @initialize(size=st.integers(1, 4), num_ranks=st.integers(1, 4))
    def start(self, size: int, num_ranks: int) -> None:
        self.size = size
        self.window = CreditWindow(size=size, num_ranks=num_ranks)
        self.published = 0
        self.acks = [0] * num_ranks

    @property
    def done(self) -> int:
        return min(self.acks)

    @precondition(lambda self: self.published - self.done < self.size)
    @rule()
    def publish(self) -> None:
        self.window.opened(self.published)
        self.published += 1

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        behind = [rank for rank, count in enumerate(self.acks) if count < self.published]
        if behind:
            rank = data.draw(st.sampled_from(behind))
            before = self.done
            seq = self.acks[rank]
            self.acks[rank] += 1
            assert self.window.acknowledged(rank, seq) == (self.done > before)

    @rule(rank=st.integers(-1, 4), seq=st.integers(-1, 20))
    def acknowledge_wrongly(self, rank: int, seq: int) -> None:
        if 0 <= rank < len(self.acks) and seq == self.acks[rank] < self.published:
            return
        with pytest.raises((AnswerLostError, ProtocolError)):
            self.window.acknowledged(rank, seq)

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.window.in_flight == self.published - self.done <= self.size
        assert self.window.oldest == self.done
        late = [rank for rank, count in enumerate(self.acks) if count == self.done] if self.published > self.done else []
        assert self.window.behind() == late
        for seq in range(self.done, self.published):
            assert self.window.missing(seq) == [rank for rank, count in enumerate(self.acks) if count <= seq]


WindowMachine.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
TestWindow = WindowMachine.TestCase
