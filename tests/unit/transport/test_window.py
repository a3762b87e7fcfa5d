"""The credit window, case by case; tests/property/test_window.py has the rest."""

from __future__ import annotations

import pytest

from zspmd.errors import AnswerLostError, InternalError, ProtocolError, TransportError
from zspmd.transport.window import CreditWindow


def window_of(num_frames: int, *, size: int = 2, num_ranks: int = 2) -> CreditWindow:
    window = CreditWindow(size=size, num_ranks=num_ranks)
    for seq in range(num_frames):
        window.opened(seq)
    return window


def test_room_comes_when_the_slowest_rank_has_acknowledged_the_oldest_frame() -> None:
    window = window_of(2)
    assert window.in_flight == window.size
    assert not window.acknowledged(0, 0)
    assert not window.acknowledged(0, 1)
    assert window.behind() == [1]
    assert window.acknowledged(1, 0)
    assert window.in_flight == 1
    assert window.acknowledged(1, 1)
    assert (window.in_flight, window.behind()) == (0, [])


def test_missing_names_the_ranks_of_a_frame() -> None:
    window = window_of(2, num_ranks=3)
    window.acknowledged(1, 0)
    window.acknowledged(1, 1)
    window.acknowledged(2, 0)
    assert window.missing(0) == [0]
    assert window.missing(1) == [0, 2]
    assert window.behind() == [0]


@pytest.mark.parametrize(
    ("rank", "seq", "error", "words"),
    [
        (0, 1, AnswerLostError, "rank 0: its answer to frame 0 was lost on the way: the next that came is to frame 1"),
        (0, 2, ProtocolError, "frame 2 where 0"),
        (0, -1, ProtocolError, "frame -1 where 0"),
        (2, 0, ProtocolError, "rank 2; the ranks are 0 to 1"),
        (-1, 0, ProtocolError, "rank -1"),
    ],
    ids=["skipped", "not published", "negative", "no such rank", "negative rank"],
)
def test_a_wrong_acknowledgement_is_refused_and_changes_nothing(rank: int, seq: int, error: type[TransportError], words: str) -> None:
    window = window_of(2)
    with pytest.raises(error, match=words):
        window.acknowledged(rank, seq)
    assert (window.in_flight, window.missing(0)) == (2, [0, 1])


def test_a_repeated_acknowledgement_is_refused() -> None:
    window = window_of(1)
    window.acknowledged(0, 0)
    with pytest.raises(ProtocolError, match="frame 0 where 1 was due"):
        window.acknowledged(0, 0)


def test_a_frame_that_was_not_published_cannot_be_acknowledged() -> None:
    window = window_of(1, num_ranks=1)
    window.acknowledged(0, 0)
    with pytest.raises(ProtocolError):
        window.acknowledged(0, 1)


@pytest.mark.parametrize("seq", [0, 2], ids=["again", "skipped"])
def test_frames_are_opened_in_order(seq: int) -> None:
    with pytest.raises(InternalError, match=f"frame {seq} published where 1 was due"):
        window_of(1).opened(seq)
