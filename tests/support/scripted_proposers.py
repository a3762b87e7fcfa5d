"""Proposers that know what will come, and model workers that use them: one always right, one never, one now and then.

What will come stands in ``oracle.json`` beside the target's weights: by the seed of a sequence, its prompt and all that follows.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zspmd.speculation_config import SpeculationConfig
from zspmd.transport.batch import BatchStep
from zspmd.workers.batch_state import BatchState, I64Array
from zspmd.workers.speculation.proposer import Proposer

from .digested_model import DigestedModel

FILE = "oracle.json"
KINDS = ("oracle", "wrong", "mixed")


def worker_of(kind: str) -> str:
    """Return the worker class, as ``launch`` takes it, whose proposer is of that kind."""
    return f"{__name__}:{kind.capitalize()}Model"


def write_oracle(directory: Path, sequences: Mapping[int, Sequence[int]]) -> None:
    """Say what will come: by seed the prompt and all that follows."""
    (directory / FILE).write_text(json.dumps({str(seed): list(tokens) for seed, tokens in sequences.items()}))


class ScriptedProposer:
    """Proposes what it was told will come ("oracle"), what will not ("wrong"), or a number of each that only looks random ("mixed").

    It checks on the way that the sequences have grown as it was told, that nobody asks for more than there is room for, and that what
    stands is settled in order.
    """

    def __init__(self, sequences: Mapping[int, Sequence[int]], kind: str, vocab_size: int) -> None:
        self._sequences = {seed: np.array(tokens, np.int32) for seed, tokens in sequences.items()}
        self._kind = kind
        self._vocab_size = vocab_size

    def follow(self, step: BatchStep, state: BatchState) -> None:
        for slot in (add.slot for add in step.adds):
            self._check(state, slot, int(state.num_tokens[slot]))

    def propose(self, state: BatchState, slots: I64Array, lengths: I64Array, most: I64Array) -> I64Array:
        counts = np.zeros(len(slots), np.int64)
        for row, (slot, length, room) in enumerate(zip(slots.tolist(), lengths.tolist(), most.tolist(), strict=True)):
            self._check(state, slot, length)
            drafts = self._choose(int(state.sampling["seed"][slot]), length, room)
            counts[row] = len(drafts)
            state.tokens[slot, length : length + len(drafts)] = drafts
        return counts

    def settle(self, slots: I64Array, lengths: I64Array) -> None:
        pass

    def draft_probabilities(self, slots: I64Array) -> Tensor | None:
        return None

    def _choose(self, seed: int, length: int, room: int) -> Any:
        drafts = self._sequences[seed][length : length + room].copy()
        if self._kind == "wrong":
            return (drafts + 1) % self._vocab_size
        if self._kind == "mixed":
            chance = zlib.crc32(f"{seed} {length}".encode())
            drafts = drafts[: chance % (room + 1)]
            drafts[chance // 64 % 6 :] += 1
            return drafts % self._vocab_size
        return drafts

    def _check(self, state: BatchState, slot: int, length: int) -> None:
        wanted = self._sequences[int(state.sampling["seed"][slot])][:length]  # its end may not have come out yet
        assert state.tokens[slot, : len(wanted)].tolist() == wanted.tolist(), f"slot {slot} holds other tokens than it should"


class ScriptedModel(DigestedModel):
    """Has a scripted proposer in place of the one that was asked for."""

    kind = ""

    def setup(self, **worker_args: Any) -> None:
        self._directory = Path(worker_args["model"])
        super().setup(**worker_args)

    def _build_proposer(self, speculation: SpeculationConfig, vocab_size: int, dtype: str, pack_weights: bool) -> Proposer:
        told = json.loads((self._directory / FILE).read_text())
        return ScriptedProposer({int(seed): tokens for seed, tokens in told.items()}, self.kind, vocab_size)


class OracleModel(ScriptedModel):
    kind = "oracle"


class WrongModel(ScriptedModel):
    kind = "wrong"


class MixedModel(ScriptedModel):
    kind = "mixed"
