"""One completion stream of a request, from waiting to finished."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from ...config import SamplingParams
from ...errors import RequestError
from .blocks import chain_digest, root_digest

I32Array = npt.NDArray[np.int32]
NO_SLOT = -1


class SequenceState(Enum):
    """WAITING -> RUNNING <-> PREEMPTED, and FINISHED from any of them."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt and what follows it; the scheduler moves it from state to state, the engine reads it.

        prompt_token_ids | output_token_ids | in flight         num_in_flight: sampled by published steps, not yet back
        <------------ num_known ----------->
        <------------------- num_tokens --------------->        num_computed: have their KV once published steps have run

    Where steps hold drafts it is known only afterwards how many tokens they sample: what is in flight, and all that counts it, are the
    most that it can be.

    Args:
        sequence_id: unique among live sequences.
        request_id: of the request that it belongs to; named in errors.
        prompt_token_ids: int32 [n], at least one token.
        params: of the request.
        seed: of its sampling noise, 0 to 2**63 - 1.
        index: its place among the request's ``n`` completions.
        cache_salt: only sequences with equal salts share blocks.

    ``finish_reason`` is "stop", "length" or "abort"; ``stop_reason`` the stop token or stop text, None for end of sequence.

    Raises:
        RequestError: an empty prompt, or a token outside 0 to 2**31 - 1.
    """

    sequence_id: str
    request_id: str
    prompt_token_ids: I32Array
    params: SamplingParams
    seed: int
    index: int = 0
    cache_salt: bytes = b""

    output_token_ids: list[int] = field(default_factory=list, init=False)
    state: SequenceState = field(default=SequenceState.WAITING, init=False)
    finish_reason: str | None = field(default=None, init=False)
    stop_reason: int | str | None = field(default=None, init=False)
    slot: int = field(default=NO_SLOT, init=False)
    blocks: list[int] = field(default_factory=list, init=False)
    num_tokens: int = field(default=0, init=False)
    num_computed: int = field(default=0, init=False)
    num_ahead: int = field(default=0, init=False)
    """Tokens that published steps can sample, whether it may grow so far or not."""
    num_told: int = field(default=0, init=False)
    """Tokens that ranks know from the driver, where it tells the stages of a pipeline what became of drafts."""
    last_step: int = field(default=0, init=False)
    """The last step of a pipeline that samples for it, as its scheduler counts them."""
    num_steps: int = field(default=0, init=False)
    """Steps that have sampled for it."""
    num_drafted: int = field(default=0, init=False)
    """Drafts of it that were verified; ``num_accepted`` of them were kept."""
    num_accepted: int = field(default=0, init=False)
    max_num_tokens: int = field(default=0, init=False)
    """Prompt and outputs at most; set by ``Scheduler.add``."""
    end_token_ids: frozenset[int] = field(default=frozenset(), init=False)
    """Tokens that end it, once there are more than ``params.min_tokens``; set by ``Scheduler.add``."""
    age: int = field(default=0, init=False)
    """Its place in the order of arrival; set by ``Scheduler.add``."""
    register_at: int = field(default=0, init=False)
    """The next block can be shared when so many tokens are known and computed."""
    _digests: list[bytes] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.prompt_token_ids = _as_token_ids(self.prompt_token_ids, self.request_id)
        self.num_tokens = len(self.prompt_token_ids)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_in_flight(self) -> int:
        return self.num_tokens - self.num_known

    @property
    def is_finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    def count_ahead(self, change: int) -> None:
        """Count tokens that published steps can sample, from now on so many more."""
        self.num_ahead += change
        self.num_tokens = min(self.num_known + self.num_ahead, self.max_num_tokens)

    def count_verified(self, most: int, count: int, num_drafts: int) -> None:
        """Count a step that could sample ``most`` tokens, of which ``count`` are about to become known."""
        self.num_steps += 1
        self.num_drafted += num_drafts
        self.num_accepted += max(0, count - 1)
        self.num_ahead -= most
        self.num_tokens = min(self.num_known + count + self.num_ahead, self.max_num_tokens)
        if self.state is SequenceState.RUNNING:
            self.num_computed = self.num_tokens - 1

    def token_ids(self, start: int = 0, stop: int | None = None) -> I32Array:
        """Return known tokens, prompt first, int32 [stop - start]."""
        stop = self.num_known if stop is None else stop
        if stop <= self.num_prompt:
            return self.prompt_token_ids[start:stop]
        outputs = self.output_token_ids[max(0, start - self.num_prompt) : stop - self.num_prompt]
        return np.concatenate([self.prompt_token_ids[start:], np.array(outputs, np.int32)])

    def block_digests(self, block_size: int) -> list[bytes]:
        """Return the digests of every full block of known tokens; each is computed once."""
        digests = self._digests
        for end in range((len(digests) + 1) * block_size, self.num_known + 1, block_size):
            parent = digests[-1] if digests else root_digest(self.cache_salt)
            digests.append(chain_digest(parent, self.token_ids(end - block_size, end)))
        return digests


def _as_token_ids(tokens: SequenceOf[int] | npt.NDArray[np.integer], request_id: str) -> I32Array:
    array = np.asarray(tokens)
    if array.ndim != 1 or not array.size:
        raise RequestError(f"a prompt has the shape {array.shape}; give a flat list of at least one token id", request_id=request_id)
    if array.dtype.kind not in "iu":
        raise RequestError(f"a prompt's token ids are {array.dtype}; give whole numbers", request_id=request_id)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= 1 << 31:
        raise RequestError(f"token id {low if low < 0 else high} of a prompt is outside 0 to 2**31 - 1", request_id=request_id)
    return array.astype(np.int32, copy=False)
