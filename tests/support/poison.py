"""A worker of an engine that some requests end: their prompts say how, and after how many of their tokens."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable

from support.plain_model import PlainModel

from zspmd.transport.batch import decode_batch_step

WORKER = "support.poison:PoisonableWorker"
MARK = (301, 17, 302)  # no prompt of text has these tokens of the demo model in this order


def segfault() -> None:
    ctypes.string_at(0)


def leave() -> None:
    os._exit(7)


def fail() -> None:
    raise RuntimeError("this request cannot be computed")


def hang() -> None:
    time.sleep(3600)


WAYS: dict[str, Callable[[], None]] = {"segfault": segfault, "exit": leave, "abort": os.abort, "raise": fail, "hang": hang}


def poison_prompt(way: str, num_outputs: int) -> list[int]:
    """Return a prompt that ends rank 1 in the step that computes its ``num_outputs``-th token, each time."""
    return [*MARK, list(WAYS).index(way), num_outputs]


class PoisonableWorker(PlainModel):
    """Computes as its base does, until a poisoned sequence has so many outputs that it is time."""

    def step(self, inputs: bytes | memoryview) -> list[object]:
        self._look_for_poison(inputs)
        return super().step(inputs)

    def _look_for_poison(self, inputs: bytes | memoryview) -> None:
        poisoned = self.__dict__.setdefault("_poisoned", {})
        batch = decode_batch_step(inputs)
        for slot in batch.deletes:
            poisoned.pop(slot, None)
        for add in batch.adds:
            prompt = add.tokens[: add.num_prompt].tolist()
            if tuple(prompt[: len(MARK)]) == MARK:
                way, limit = prompt[len(MARK) :]
                poisoned[add.slot] = [way, limit, len(add.tokens) - len(prompt)]
        for way, limit, num_outputs in poisoned.values():
            if num_outputs >= limit and self.ctx.rank == 1:
                list(WAYS.values())[way]()
        for entry in poisoned.values():
            entry[2] += 1
