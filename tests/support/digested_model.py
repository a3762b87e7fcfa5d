"""The engine's model worker, digesting in each step what it decided: how many drafts, which ones, and what was known after it."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

import zspmd
from zspmd.transport.batch import BatchStep
from zspmd.workers.batch_state import BatchState, StepRows
from zspmd.workers.model_worker import ModelWorker

WORKER = f"{__name__}:DigestedModel"


class DigestedModel(ModelWorker):
    """Computes as its base does."""

    def setup(self, **worker_args: Any) -> None:
        self._digests: list[bytes] = []
        self._noted: list[bytes] = []
        super().setup(**worker_args)
        if self._speculator is not None:
            self._extend_rows = self._speculator.extend
            setattr(self._speculator, "extend", self._noting)  # noqa: B010  # an assignment to a method is none to a type checker

    def step(self, inputs: Any) -> list[object]:
        answer = super().step(inputs)
        if self._noted and self._state is not None:
            digest = hashlib.blake2b(b"".join(self._noted), digest_size=8)
            for slot in np.flatnonzero(self._state.is_live).tolist():
                digest.update(self._state.tokens[slot, : self._state.num_tokens[slot]].tobytes())
            self._digests.append(digest.digest())
            self._noted.clear()
        return answer

    @zspmd.rpc
    def take_digests(self) -> list[bytes]:
        """Return one digest for each step of this replica since the last call."""
        digests, self._digests = self._digests, []
        return digests

    def _noting(self, step: BatchStep, state: BatchState, rows: StepRows) -> StepRows:
        assert self._speculator is not None
        extended = self._extend_rows(step, state, rows)
        self._noted.append(np.array([self._speculator.depth, len(extended.slots)]).tobytes())
        self._noted += [extended.slots.tobytes(), extended.num_tokens.tobytes()]
        for slot, start, end in zip(extended.slots.tolist(), extended.starts.tolist(), extended.ends.tolist(), strict=True):
            self._noted.append(state.tokens[slot, start:end].tobytes())
        return extended
