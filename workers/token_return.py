"""Sampled tokens on their way from the last stage of a pipeline to the first, which embeds them in the step that goes on with them.

    stage 0   A1 B1 | A2 B2 | A3        A, B: parts of the running sequences
                   t|A1    t|A2         stage 0 takes the tokens of A1 before it computes A2: no sooner, since it has B1 to do
    stage 1      A1 | B1  A2 | B2

All stages append what a step samples, so that their batch states count alike: the last one the tokens, the others zeros in their place.
Middle stages never read them. The first one overwrites its zeros before the first step that computes one of these sequences; both ends
know from the steps alone for which of them a message is sent, how long it is and when it is taken. Messages are taken in their order.

Nobody waits in a circle: a send waits for nobody, and what the first stage waits for before a step is the last one's end of an earlier
step, which the stages between have all that they need for. So that what is on the way stays within what ``send_nowait`` takes, the
first stage takes the oldest, which it may never need, once there are too many.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..transport.batch import SlotAdd
from .batch_state import BatchState, I32Array, I64Array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .communicators.communicator import Communicator

MOST_TOKENS = 1 << 15  # that are left on the way when a step begins: a third of what fits, since the step may add twice as many
_MOST_MESSAGES = 60


@dataclass(frozen=True)
class _Message:
    """Tokens that the first stage has not taken: of which slots, and where in these; int64 [R] each."""

    number: int
    slots: I64Array
    places: I64Array


class TokenReturn:
    """One stage's end of the way.

    Args:
        communicator: of the pp axis, for CPU tensors; its places are the stages, of which there are several.
        max_num_seqs: slots.
    """

    def __init__(self, communicator: Communicator, max_num_seqs: int) -> None:
        self._communicator = communicator
        self._last_stage = communicator.size - 1
        self._most_messages = min(2 * communicator.size, _MOST_MESSAGES)
        self._on_the_way: deque[_Message] = deque()
        self._num_tokens = 0  # on the way
        self._num_messages = 0  # so far
        self._due = np.zeros(max_num_seqs, np.int64)  # the message that has a slot's newest token; 0 where it is known

    def take(self, state: BatchState, adds: Sequence[SlotAdd], slots: I64Array) -> None:
        """On the first stage, complete in ``state`` the tokens of the slots that a step computes; nothing on the others.

        Args:
            adds: of the step, which has been applied; tokens for what held these slots before are dropped.
            slots: int64 [N], of the step's rows.

        Raises:
            PeerLostError: the last stage ended or is late.
        """
        if not self._communicator.is_first:
            return
        for add in adds:
            self._due[add.slot] = 0
        last_due = self._due[slots].max(initial=0)
        while self._on_the_way and (
            self._on_the_way[0].number <= last_due or self._num_tokens > MOST_TOKENS or len(self._on_the_way) > self._most_messages
        ):
            self._take_oldest(state)

    def append_sampled(self, state: BatchState, slots: I64Array, tokens: I32Array | None) -> None:
        """Append what the step has sampled, and on the last stage send it.

        Args:
            slots: int64 [R], no slot twice.
            tokens: int32 [R]; None on the other stages.
        """
        if not len(slots):
            return
        if tokens is not None:
            state.append_sampled(slots, tokens)
            self._communicator.send_nowait(torch.from_numpy(tokens), 0)
            return
        places = state.num_tokens[slots]
        state.append_sampled(slots, np.zeros(len(slots), np.int32))
        if self._communicator.is_first:
            self._num_messages += 1
            self._num_tokens += len(slots)
            self._on_the_way.append(_Message(self._num_messages, slots, places))
            self._due[slots] = self._num_messages

    def _take_oldest(self, state: BatchState) -> None:
        message = self._on_the_way.popleft()
        self._num_tokens -= len(message.slots)
        received = torch.empty(len(message.slots), dtype=torch.int32)
        self._communicator.receive(received, self._last_stage)
        is_due = self._due[message.slots] == message.number
        slots = message.slots[is_due]
        state.tokens[slots, message.places[is_due]] = received.numpy()[is_due]
        self._due[slots] = 0
