"""A side of ``bench engine``: the same model, sampler and cache in a bare loop, in one process.

    python -m zspmd.runtime.programs.bench.bare_loop MODEL BATCH POSITIONS DTYPE

No driver, no scheduler, no sockets: ``ModelWorker.step`` is called again and again with a batch that was laid out before, every block
handed out at the start. What an engine is measured against.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from typing import Any

import numpy as np

from ....config import ParallelConfig
from ....topology import AxisGroup, axis_group
from ....transport.batch import BatchStep, SlotAdd, encode_batch_step
from ....transport.trace_spans import NO_TRACE
from ....workers.communicators.solo import SoloCommunicator
from ....workers.model_worker import ModelWorker
from .generation import Turn, turn_in_step
from .side_server import answers, serve

BLOCK_SIZE = 16
_SAME_AS_BEFORE = encode_batch_step(BatchStep())
_NO_SLOTS = np.empty(0, np.uint16)


class _MeshOfOne:
    """Every axis with this process alone on it."""

    parallel = ParallelConfig()

    def group(self, axis: str) -> AxisGroup:
        return axis_group(self.parallel, axis, 0)

    def __getitem__(self, axis: str) -> SoloCommunicator:
        return SoloCommunicator(self.group(axis))


class _Alone:
    """What ``ModelWorker`` asks of its context, in a process that is no rank."""

    device = "cpu"
    trace = NO_TRACE
    rank = local_rank = 0
    world_size = local_world_size = 1
    mesh = _MeshOfOne()

    def report_progress(self, done: int, total: int, what: str) -> None:
        """Nobody to tell."""


class BareLoop:
    """A model worker outside any launch, with slots and blocks for ``batch`` sequences of ``num_positions``."""

    def __init__(self, model: str, *, batch: int, num_positions: int, dtype: str = "auto") -> None:
        self._worker = ModelWorker()
        self._worker.ctx = _Alone()  # type: ignore[assignment]  # all that it uses of a context is here
        self._worker.setup(model=model, dtype=dtype, block_size=BLOCK_SIZE, max_num_seqs=batch, max_model_len=num_positions)
        self._blocks_each = -(-num_positions // BLOCK_SIZE)
        self._worker.allocate_kv_cache(batch * self._blocks_each + 1)
        self._live: list[int] = []

    def run_turn(self, prompts: list[list[int]], num_output: int) -> Turn:
        """Generate ``num_output`` tokens, at least 2, for each prompt; the prompts are computed in one step."""
        times, by_step = list[float](), list[Any]()
        started = time.perf_counter()
        for step in self._steps(prompts, num_output):
            by_step.append(self._worker.step(step)[0])
            times.append(time.perf_counter() - started)
        return turn_in_step(times, np.stack(by_step, axis=1).tolist())

    def _steps(self, prompts: list[list[int]], num_output: int) -> list[bytes]:
        slots = np.arange(len(prompts), dtype=np.uint16)
        prefill = BatchStep(
            deletes=self._live,
            adds=[self._add(slot, prompt) for slot, prompt in enumerate(prompts)],
            chunk_slots=slots,
            chunk_tokens=np.array([len(prompt) for prompt in prompts], np.uint32),
            decode_slots=_NO_SLOTS,
        )
        self._live = slots.tolist()
        first_decode = BatchStep(decode_slots=slots)
        return [encode_batch_step(prefill), encode_batch_step(first_decode), *([_SAME_AS_BEFORE] * (num_output - 2))]

    def _add(self, slot: int, prompt: list[int]) -> SlotAdd:
        first = 1 + slot * self._blocks_each
        blocks = np.arange(first, first + self._blocks_each, dtype=np.uint32)
        return SlotAdd(slot, np.array(prompt, np.int32), num_prompt=len(prompt), num_computed=0, blocks=blocks)


def main() -> None:
    """Serve the turns that the benchmark asks for."""
    model, batch, num_positions, dtype = sys.argv[1:]
    with answers() as stream:
        loop = BareLoop(model, batch=int(batch), num_positions=int(num_positions), dtype=dtype)
        gc.collect()
        gc.freeze()  # as in ranks

        def take_turn(request: dict[str, Any]) -> dict[str, Any]:
            return loop.run_turn(request["prompts"], request["num_output"]).to_json()

        serve(stream, take_turn, {"threads": os.environ.get("OMP_NUM_THREADS", "")})


if __name__ == "__main__":
    main()
