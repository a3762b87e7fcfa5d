"""Comparing replayed answers with recorded ones: every difference in a bit is found, and named by its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.recordings import write_recording

from zspmd.transport.codec import BFLOAT16, ValueEncoder
from zspmd.transport.comparison import Comparison, first_difference, frame_label
from zspmd.transport.frames import ResultKind
from zspmd.transport.recorded_launch import Recording
from zspmd.transport.records import Failure
from zspmd.transport.schema import pack_record

LOGITS = np.arange(18.0).reshape(3, 6)
ARRAY = "ndarray of shape [{}] and dtype float{}"
HALF_ONE, HALF_TWO = (np.array([bits], "<u2").view(BFLOAT16) for bits in (0x3F80, 0x4000))
CHANGED = np.where(LOGITS == 17, 1.5, LOGITS)


@pytest.mark.parametrize(
    ("recorded", "replayed", "told"),
    [
        ({"logits": LOGITS}, {"logits": CHANGED}, 'answer["logits"][2, 5]: recorded 17.0, replayed 1.5 (1 of 18 differ)'),
        ([1, [2.0, 3.0]], [1, [2.0, 3.5]], "answer[1][1]: recorded 3.0, replayed 3.5"),
        ({1: None}, {1: False}, "answer[1]: recorded the NoneType None, replayed the bool False"),
        (1, 1.0, "answer: recorded the int 1, replayed the float 1.0"),
        (0.0, -0.0, "answer: recorded 0.0, replayed -0.0"),
        ([1, 2], [1], "answer: recorded 2 items, replayed 1"),
        ({"a": 1, "b": 2}, {"a": 1}, "answer has no 'b' in the replay"),
        ({"a": 1}, {"a": 1, "b": 2}, "answer has a 'b' in the replay only"),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, "answer: its keys are in another order"),
        ("a long text", "a long word", "answer, from 7 on: recorded 'text', replayed 'word'"),
        (b"abc", b"abcd", "answer, from 3 on: recorded b'', replayed b'd'"),
        (
            np.zeros(3),
            np.zeros(4),
            "answer: recorded ndarray of shape [3] and dtype float64, replayed ndarray of shape [4] and dtype float64",
        ),
        (
            np.zeros(3),
            np.zeros(3, "f4"),
            "answer: recorded ndarray of shape [3] and dtype float64, replayed ndarray of shape [3] and dtype float32",
        ),
        (np.array(1), np.array(2), "answer: recorded 1, replayed 2 (1 of 1 differ)"),
        (np.zeros(2), np.array([0.0, -0.0]), "answer[1]: recorded 0.0, replayed -0.0 (1 of 2 differ)"),
        (
            np.array([0x3F80], "<u2").view(BFLOAT16),
            np.array([0x4000], "<u2").view(BFLOAT16),
            "answer[0]: recorded 1.0, replayed 2.0 (1 of 1 differ)",
        ),
    ],
    ids=str,
)
def test_the_first_difference_is_named_by_its_path(recorded: Any, replayed: Any, told: str) -> None:
    assert first_difference(recorded, replayed) == told


@pytest.mark.parametrize(
    "value",
    [None, 1, float("nan"), "x", b"", [], {"a": [1, {"b": np.zeros((0, 3))}]}, np.array([np.nan, 1.0]), np.zeros(2, BFLOAT16)],
    ids=str,
)
def test_equal_values_have_none(value: Any) -> None:
    assert first_difference(value, value) is None


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    frames = [{"x": 1}, ["info", [], {}, [0]], {"x": 2}]
    big = np.arange(5000.0)
    return Recording.open(str(write_recording(tmp_path / "run.zsr", frames=frames, answers=[(0, 1, big), (1, 1, big), (0, 2, "two")])))


def answer(comparison: Comparison, rank: int, seq: int, value: Any, kind: ResultKind = ResultKind.OUTPUT) -> None:
    comparison.answered(rank, seq, kind, *ValueEncoder().encode(value))


def test_each_answer_is_counted_by_rank(recording: Recording) -> None:
    comparison = Comparison(recording, [0, 1])
    answer(comparison, 0, 1, np.arange(5000.0))
    answer(comparison, 0, 2, "two", ResultKind.REPLY)
    answer(comparison, 0, 3, "not recorded")
    answer(comparison, 1, 1, np.arange(5000.0) + (np.arange(5000) == 4321))
    answer(comparison, 2, 1, "of no interest")
    comparison.answered(0, 3, ResultKind.ACK, b"", ())
    comparison.finish()
    assert not comparison.is_equal
    assert comparison.table() == [
        "rank  steps  calls  equal  first difference",
        "0     1      1      2      none (1 more answers, which the recording has not)",
        "1     1      0      0      step 0: answer[4321]: recorded 4321.0, replayed 4322.0 (1 of 5000 differ)",
    ]


def test_a_place_that_is_ignored_may_differ_in_steps(tmp_path: Path) -> None:
    value = [1, {"time": 5, "depth": 2}]
    path = write_recording(tmp_path / "run.zsr", frames=[{}, ["info", [], {}, [0]]], answers=[(0, 1, value), (0, 2, value)])
    for ignored, kind, other, is_equal in (
        ('answer[1]["time"]', ResultKind.OUTPUT, [1, {"time": 6, "depth": 2}], True),
        ('answer[1]["time"]', ResultKind.OUTPUT, [1, {"time": 6, "depth": 3}], False),
        ('answer[1]["depth"]', ResultKind.OUTPUT, [1, {"time": 6, "depth": 2}], False),
        ('answer[1]["time"]', ResultKind.OUTPUT, [1, {"depth": 2}], False),
        ('answer[1]["time"]', ResultKind.REPLY, [1, {"time": 6, "depth": 2}], False),
    ):
        comparison = Comparison(Recording.open(str(path)), [0], [ignored])
        answer(comparison, 0, 1 if kind is ResultKind.OUTPUT else 2, other, kind)
        assert comparison.is_equal is is_equal


def test_what_was_not_answered_is_a_difference(recording: Recording) -> None:
    comparison = Comparison(recording, [0])
    answer(comparison, 0, 1, np.arange(5000.0))
    comparison.finish()
    assert comparison.rows[0].first_difference == "call of 'info' (frame 2): was answered when it was recorded, and not in the replay"


def test_an_error_instead_of_an_answer_is_a_difference(recording: Recording) -> None:
    comparison = Comparison(recording, [0])
    failure = Failure(exception_type="builtins.ValueError", message="no", traceback="", phase="call", step_id=0)
    comparison.answered(0, 2, ResultKind.CALL_ERROR, pack_record(failure), ())
    assert comparison.rows[0].first_difference == "call of 'info' (frame 2): recorded an answer, replayed builtins.ValueError: 'no'"


def test_steps_are_numbered_without_the_calls(recording: Recording) -> None:
    assert [frame_label(recording, seq) for seq in (1, 2, 3)] == ["step 0", "call of 'info' (frame 2)", "step 1"]
