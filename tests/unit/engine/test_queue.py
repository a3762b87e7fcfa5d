"""WaitingQueue: order of age, and who is held back."""

from __future__ import annotations

import numpy as np
import pytest

from zspmd.config import SamplingParams
from zspmd.errors import InternalError
from zspmd.runtime.engine.queue import WaitingQueue
from zspmd.runtime.engine.request import Sequence


def build(age: int, request: str) -> Sequence:
    sequence = Sequence(f"{request}/{age}", request, np.ones(1, np.int32), SamplingParams(), seed=0)
    sequence.age = age
    return sequence


def test_it_begins_with_the_oldest() -> None:
    queue, (oldest, middle, newest) = WaitingQueue(), [build(age, "r") for age in range(3)]
    queue.append(middle)
    queue.append(newest)
    queue.prepend(oldest)
    assert queue.first() is oldest
    queue.remove(oldest)
    assert queue.first() is middle
    assert (len(queue), list(queue)) == (2, [middle, newest])
    assert (queue.get(middle.sequence_id), queue.get(oldest.sequence_id)) == (middle, None)


def test_requests_that_are_not_admitted_wait_and_come_back_in_order() -> None:
    queue = WaitingQueue()
    first, second, third, later = (build(age, name) for age, name in enumerate("abac"))
    for sequence in (first, second, third):
        queue.append(sequence)
    queue.admit_only(["b"])
    queue.append(later)
    queue.validate()
    assert queue.first() is second
    assert list(queue) == [second, first, third, later]
    assert queue.get(later.sequence_id) is later
    queue.remove(second)
    assert queue.first() is None
    queue.remove(third)
    queue.admit_only(None)
    queue.validate()
    assert list(queue) == [first, later]


def test_nobody_at_all_may_be_admitted() -> None:
    queue = WaitingQueue()
    queue.admit_only([])
    queue.append(build(0, "a"))
    assert (queue.first(), len(queue)) == (None, 1)


def test_a_sequence_out_of_order_is_found() -> None:
    queue = WaitingQueue()
    queue.append(build(1, "a"))
    queue.append(build(0, "a"))
    with pytest.raises(InternalError, match="out of order"):
        queue.validate()
