"""Strategies for batch steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from zspmd.transport.batch import BatchStep, SlotAdd


def slot_arrays(dtype: Any, size: int) -> st.SearchStrategy[npt.NDArray[Any]]:
    return hnp.arrays(dtype, size, elements=st.integers(0, np.iinfo(dtype).max))


@st.composite
def slot_adds(draw: st.DrawFn) -> SlotAdd:
    tokens = draw(slot_arrays(np.int32, draw(st.integers(1, 5))))
    return SlotAdd(
        slot=draw(st.integers(0, 65_535)),
        tokens=tokens,
        num_prompt=draw(st.integers(1, len(tokens))),
        num_computed=draw(st.integers(0, len(tokens) - 1)),
        blocks=draw(slot_arrays(np.uint32, draw(st.integers(0, 3)))),
        seed=draw(st.integers(0, (1 << 63) - 1)),
        temperature=draw(st.floats(0, 100)),
        logprobs=draw(st.integers(-1, 20)),
        end_token_ids=draw(slot_arrays(np.int32, draw(st.integers(0, 2)))),
    )


@st.composite
def batch_steps(draw: st.DrawFn) -> BatchStep:
    num_blocks, num_chunks = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    return BatchStep(
        deletes=draw(st.lists(st.integers(0, 65_535), max_size=4)),
        adds=draw(st.lists(slot_adds(), max_size=2)),
        block_slots=draw(slot_arrays(np.uint16, num_blocks)),
        block_ids=draw(slot_arrays(np.uint32, num_blocks)),
        chunk_slots=draw(slot_arrays(np.uint16, num_chunks)),
        chunk_tokens=draw(slot_arrays(np.uint32, num_chunks)),
        decode_slots=draw(st.none() | slot_arrays(np.uint16, draw(st.integers(0, 4)))),
    )
