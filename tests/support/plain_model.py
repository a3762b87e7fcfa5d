"""Ranks for an engine that do without torch: a process starts in a fraction of the time, and every token is known beforehand.

The batch is the real one, so a sequence that comes back with a token too few or too many goes on otherwise than it should.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import zspmd
from zspmd.runtime.driver.launching import launch
from zspmd.transport.batch import decode_batch_step
from zspmd.workers.batch_state import BatchState

WORKER = "support.plain_model:PlainModel"
STEP_S = 0.005  # about what the demo model takes: streams must not be over before a test has looked at them
NUM_TOKENS = 250  # below the vocabulary of the demo model


def next_token(tokens: Sequence[int]) -> int:
    """Return what follows the tokens of a sequence; it depends on each of them and on their order."""
    return sum(place * token for place, token in enumerate(tokens, 1)) % NUM_TOKENS


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """Return the first ``count`` tokens that follow a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


def use_plain_ranks(patch: pytest.MonkeyPatch, worker: str = WORKER) -> None:
    """Have engines start ranks of a worker of this kind in place of the model worker, without preloading torch."""

    def launch_plain(_: str, *, preload: Sequence[str], **options: Any) -> zspmd.WorkerGroup:
        return launch(worker, preload=(worker.partition(":")[0],), **options)

    patch.setattr("zspmd.runtime.engine.engine.launch", launch_plain)


class PlainModel(zspmd.Worker):
    """Has the interface of the model worker, greedy sampling alone, and no weights."""

    def setup(self, *, block_size: int, max_num_seqs: int, max_model_len: int, **of_the_model: Any) -> None:
        self._sizes = (max_num_seqs, max_model_len, block_size)

    @zspmd.rpc
    def kv_capacity(self) -> dict[str, int]:
        return {"bytes_per_block": 1, "free_bytes": 1 << 30}

    @zspmd.rpc
    def allocate_kv_cache(self, num_blocks: int) -> None:
        self._state = BatchState(*self._sizes, num_blocks)

    def step(self, inputs: bytes | memoryview) -> list[object]:
        state = self._state
        rows = state.apply(decode_batch_step(inputs))
        if len(rows.slots):
            time.sleep(STEP_S)
            self.ctx.coordinator.barrier()  # ranks wait for one another, as in the collectives of a model
        state.mark_computed(rows)
        slots = rows.slots[state.num_computed[rows.slots] == state.num_tokens[rows.slots]]
        tokens = np.array([next_token(state.tokens[slot, : state.num_tokens[slot]].tolist()) for slot in slots], np.int32)
        state.append_sampled(slots, tokens)
        return [tokens, None]
