"""StopMatcher: the same outcome however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zspmd.runtime.engine.stops import StopMatcher


def feed(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    matcher, shown = StopMatcher(stops), []
    for piece in pieces:
        text, stop = matcher.push(piece)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, matcher.flush()], None


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stop"),
    [
        ([], ["ab", "c"], ["ab", "c", ""], None),
        (["END"], ["a", "E", "N", "D", "b"], ["a", "", "", ""], "END"),
        (["END"], ["aE", "Nx"], ["a", "ENx", ""], None),
        (["END"], ["aEEN", "D"], ["aE", ""], "END"),
        (["END"], ["aEN"], ["a", "EN"], None),
        (["xyz", "y"], ["axyz"], ["ax"], "y"),
        (["b", "ab"], ["xab"], ["x"], "ab"),
        (["aab"], ["aaab"], ["a"], "aab"),
        (["later", "a"], ["later a"], ["l"], "a"),
    ],
    ids=["no stops", "by letters", "not it", "starts again", "held to the end", "first complete", "longest", "overlap", "earliest"],
)
def test_what_is_shown_and_when(stops: list[str], pieces: list[str], shown: list[str], stop: str | None) -> None:
    assert feed(stops, pieces) == (shown, stop)


def test_a_stop_that_may_not_count_yet_is_shown_and_does_not_count_later() -> None:
    matcher = StopMatcher(["aa", "aab"])
    assert matcher.push("aa", may_stop=False) == ("", None)
    assert matcher.push("x") == ("aax", None)
    assert matcher.push("aa") == ("", "aa")


def first_complete(stops: list[str], text: str) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.text("ab", max_size=4), max_size=8))
def test_pieces_make_no_difference(stops: list[str], pieces: list[str]) -> None:
    shown, stop = feed(stops, pieces)
    assert ("".join(shown), stop) == first_complete(stops, "".join(pieces))
