"""Values and batch steps come back from the codec as they went in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from support.steps import batch_steps
from support.values import values

from zspmd.transport.batch import BatchStep, SlotAdd, decode_batch_step, encode_batch_step
from zspmd.transport.codec import ValueEncoder, decode_value

pytestmark = pytest.mark.usefixtures("no_bridges")
QUICK = settings(deadline=None, max_examples=150)


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal, arrays by dtype, shape and bits."""
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return isinstance(right, dict) and list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and bool(left == right)


@QUICK
@given(values)
def test_any_value_comes_back(value: Any) -> None:
    body, buffers = ValueEncoder().encode(value)
    assert same(value, decode_value(body, buffers))


def plain(value: Any) -> Any:
    """Return a step as nested lists, to be compared."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, (BatchStep, SlotAdd)):
        return [plain(getattr(value, name)) for name in value.__dataclass_fields__]
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@QUICK
@given(batch_steps())
def test_any_batch_step_comes_back(step: BatchStep) -> None:
    assert plain(decode_batch_step(encode_batch_step(step))) == plain(step)
