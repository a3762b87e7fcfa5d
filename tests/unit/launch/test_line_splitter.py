from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zspmd.runtime.launch.line_splitter import MAX_LINE_BYTES, LineSplitter


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"one\ntwo\n"], ["one", "two"]),
        ([b"on", b"e\nt", b"wo"], ["one", "two"]),
        ([b"a\r\n", b"b\r", b"\n"], ["a", "b"]),
        ([b" 1%\r 50%\r100%\n"], ["100%"]),
        ([b" 1%\r", b" 50%\r"], [" 50%"]),
        ([b"caf\xc3", b"\xa9\n"], ["café"]),
        ([b"\xff\n"], ["\N{REPLACEMENT CHARACTER}"]),
        ([b"\n\n"], ["", ""]),
        ([], []),
    ],
    ids=["lines", "partial", "windows", "progress", "progress without end", "split character", "not utf-8", "empty lines", "nothing"],
)
def test_lines(chunks: list[bytes], lines: list[str]) -> None:
    splitter = LineSplitter()
    assert [line for chunk in chunks for line in splitter.feed(chunk)] + splitter.flush() == lines
    assert splitter.flush() == []


@pytest.mark.parametrize("end", [b"\n", b""], ids=["ended", "open"])
def test_a_long_line_is_cut_and_marked(end: bytes) -> None:
    splitter = LineSplitter()
    lines = splitter.feed(b"x" * (2 * MAX_LINE_BYTES + 3) + end) + splitter.flush()
    assert [len(line) for line in lines] == [MAX_LINE_BYTES + 1, MAX_LINE_BYTES + 1, 3]
    assert [line[-1] for line in lines] == ["…", "…", "x"]


def test_endless_progress_needs_bounded_memory() -> None:
    splitter = LineSplitter()
    for percent in range(20_000):
        assert splitter.feed(f"\rloading {percent:5}".encode()) == []
        assert len(splitter._partial) <= MAX_LINE_BYTES
    assert splitter.flush() == ["loading 19999"]


@given(st.lists(st.binary(max_size=30)))
def test_how_the_bytes_arrive_does_not_matter(chunks: list[bytes]) -> None:
    parted, whole = LineSplitter(), LineSplitter()
    assert [line for chunk in chunks for line in parted.feed(chunk)] + parted.flush() == whole.feed(b"".join(chunks)) + whole.flush()


def test_a_progress_bar_is_told_in_states_that_are_complete() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"\r 10%|#") == []
    assert splitter.take_state() == []
    assert splitter.feed(b"\r 20%|##\r 3") == []
    assert splitter.is_overwritten
    assert splitter.take_state() == [" 20%|##"]
    assert splitter.take_state() == []
    assert splitter.feed(b"0%|###\rdone\n") == ["done"]
