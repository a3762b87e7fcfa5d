"""Strategies for values that may travel, for frames, and for bytes that were damaged on the way."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zspmd.transport import codec
from zspmd.transport.frames import WIRE_VERSION

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
dtypes = st.sampled_from([dtype for dtype in codec._DTYPES if dtype.names is None])
arrays: st.SearchStrategy[npt.NDArray[Any]] = dtypes.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=7, min_side=0, max_side=3))
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.integers(-5, 1 << 60), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """Draw valid bytes with some of them changed, cut out or put in."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=6))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 6))]
        elif at < len(data):
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


def headed(magic: bytes, num_kinds: int) -> st.SearchStrategy[bytes]:
    """Return frames of any kind and body, known or not and long enough or not, behind the right magic and version."""
    return st.builds(lambda kind, rest: magic + bytes((WIRE_VERSION, kind)) + rest, st.integers(0, num_kinds + 1), st.binary(max_size=60))
