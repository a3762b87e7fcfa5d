"""From logits to tokens, the same on every rank.

Rows of two kinds, told apart by the batch state alone, so that all ranks enter the same collectives:

    by shard    greedy, and plain temperature: each rank finds the best of its shard of the vocabulary, and one all-gather of a value
                and an index a row decides
    whole       top_k, top_p, min_p or logprobs: the rows' logits are all-gathered, then every rank computes the same

Chance is Gumbel noise hashed from seed, place in the sequence and token id (see ``gumbel``). A sequence has a row for each place whose
token is to be sampled: one, or with drafts several, each as if the tokens before it were known.

Shapes: R rows, W columns of a shard, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InternalError
from .batch_state import BatchState, I32Array, I64Array
from .filters import build_keep_mask
from .gumbel import Stream, gumbel_noise, row_keys
from .penalties import apply_penalties

if TYPE_CHECKING:
    from ..models.communicator import Communicator

# [log-probability of the sampled token, [[token id, log-probability], ...] of the likeliest ones, best first]
RowLogprobs = list[Any]
_NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Draw:
    """Tokens that were drawn, and what is needed to describe them.

    Args:
        token_ids: int32 [R].
        whole: int64 [W], the rows of which the logits of the whole vocabulary were gathered.
        logits: float32 [W, V], these; None where there are none.
    """

    token_ids: I32Array
    whole: I64Array
    logits: Tensor | None


@dataclass(frozen=True)
class SampledTokens:
    """What one step sampled.

    Args:
        token_ids: int32 [R].
        logprobs: one entry a row, None for rows that did not ask; None when no row did.
    """

    token_ids: I32Array
    logprobs: list[RowLogprobs | None] | None


class Sampler:
    """Samples the next token of each row from logits that are sharded over a communicator's ranks.

    Args:
        communicator: of the ranks that hold the vocabulary, in order.
        vocab_size: tokens that may be sampled; columns past it are padding.
        vocab_start, vocab_end: this rank's columns, as wide on every rank.
    """

    def __init__(self, communicator: Communicator, vocab_size: int, vocab_start: int, vocab_end: int) -> None:
        self._communicator = communicator
        self._vocab_size = vocab_size
        self._vocab_start = vocab_start
        self._width = vocab_end - vocab_start

    def sample(self, logits: Tensor, state: BatchState, slots: I64Array, places: I64Array) -> SampledTokens:
        """Return a token for each row with its log-probabilities; arguments and order of use as for ``draw``."""
        draw = self.draw(logits, state, slots, places)
        return SampledTokens(draw.token_ids, self.describe(draw, state, slots, draw.token_ids))

    def draw(self, logits: Tensor, state: BatchState, slots: I64Array, places: I64Array, *, stream: Stream = Stream.SAMPLE) -> Draw:
        """Return a token for each row; the state is read, not changed. All ranks of the communicator must call it.

        Args:
            logits: float32 [R, W], this rank's shard, padded columns -inf; R is at least 1. Never written to.
            slots: int64 [R], the slot of each row.
            places: int64 [R], the index in its sequence of the token that is sampled.
            stream: of the noise, see ``gumbel``.

        Raises:
            InternalError: logits of a row are not numbers, or leave no token to choose.
        """
        assert logits.shape == (len(slots), self._width), (logits.shape, len(slots), self._width)
        if state.is_greedy[slots].all():
            return Draw(self._choose(logits, slots), _NO_ROWS, None)
        needs_whole = state.sampling["is_whole"][slots]
        if not needs_whole.any():
            return Draw(self._draw_by_shard(logits, state, slots, places, stream), _NO_ROWS, None)
        token_ids = np.empty(len(slots), np.int32)
        sharded, whole = np.flatnonzero(~needs_whole), np.flatnonzero(needs_whole)
        if len(sharded):
            token_ids[sharded] = self._draw_by_shard(_take_rows(logits, sharded), state, slots[sharded], places[sharded], stream)
        rows = self._gather_rows(_take_rows(logits, whole))
        token_ids[whole] = _draw_whole(rows, state, slots[whole], places[whole], stream)
        return Draw(token_ids, whole, rows)

    def describe(self, draw: Draw, state: BatchState, slots: I64Array, token_ids: I32Array) -> list[RowLogprobs | None] | None:
        """Return the log-probabilities that rows asked for, as ``SampledTokens`` has them.

        Args:
            draw: of these rows.
            slots: int64 [R].
            token_ids: int32 [R], one of each row: those of ``draw``, or others.
        """
        wanted = state.sampling["logprobs"][slots]
        if draw.logits is None or (wanted < 0).all():
            return None
        whole = draw.whole
        asked = np.flatnonzero(wanted[whole] >= 0)
        described = _describe(_take_rows(draw.logits, asked), token_ids[whole][asked], wanted[whole][asked])
        by_row = dict(zip(whole[asked].tolist(), described))
        return [by_row.get(row) for row in range(len(slots))]

    def filtered_scores(self, logits: Tensor, state: BatchState, slots: I64Array, places: I64Array) -> Tensor:
        """Return the scores, float64 [R, V], whose softmax rows with a temperature are drawn from: -inf for what a filter took.

        Arguments and order of use as for ``draw``.
        """
        rows = apply_penalties(self._gather_rows(logits), state, slots, places, 0)
        params = state.sampling[slots]
        scores = rows.double() / torch.from_numpy(params["temperature"]).to(rows.device)[:, None]
        return scores.masked_fill(~build_keep_mask(scores, params), -torch.inf)

    def _draw_by_shard(self, logits: Tensor, state: BatchState, slots: I64Array, places: I64Array, stream: Stream) -> I32Array:
        start = self._vocab_start
        return self._choose(_add_noise(apply_penalties(logits, state, slots, places, start), state, slots, places, stream, start), slots)

    def _choose(self, scores: Tensor, slots: I64Array) -> I32Array:
        best = _find_best(scores, self._vocab_start)
        return _pick(best[None] if self._communicator.size == 1 else self._communicator.all_gather(best), slots)

    def _gather_rows(self, logits: Tensor) -> Tensor:
        """Return the rows [R, V] from every rank's shard of them."""
        shards = self._communicator.all_gather(logits)  # [size, R, W]
        return shards.transpose(0, 1).reshape(len(logits), -1)[:, : self._vocab_size]


def _draw_whole(rows: Tensor, state: BatchState, slots: I64Array, places: I64Array, stream: Stream) -> I32Array:
    scores = _add_noise(apply_penalties(rows, state, slots, places, 0), state, slots, places, stream, 0, is_filtered=True)
    return _pick(_find_best(scores, 0)[None], slots)


def _add_noise(
    logits: Tensor, state: BatchState, slots: I64Array, places: I64Array, stream: Stream, vocab_start: int, *, is_filtered: bool = False
) -> Tensor:
    """Return the scores whose largest is the sample: greedy rows as they are, the others over temperature and with noise."""
    random = np.flatnonzero(state.sampling["is_random"][slots])
    if not len(random):
        return logits
    params, device = state.sampling[slots[random]], logits.device
    keys = torch.from_numpy(row_keys(params["seed"], places[random], stream)).to(device)
    scores = _take_rows(logits, random).double() / torch.from_numpy(params["temperature"]).to(device)[:, None]
    if is_filtered:
        keep = build_keep_mask(scores, params)
        rows, columns = keep.nonzero(as_tuple=True)
        kept = scores[rows, columns] + gumbel_noise(keys[rows], (columns + vocab_start).int())
        scores = torch.full_like(scores, -torch.inf).index_put_((rows, columns), kept)
    else:
        token_ids = torch.arange(vocab_start, vocab_start + logits.shape[1], dtype=torch.int32, device=device)
        scores += gumbel_noise(keys[:, None], token_ids)
    if len(random) == len(slots):
        return scores
    return logits.double().index_copy_(0, torch.from_numpy(random).to(device), scores)


def _find_best(scores: Tensor, vocab_start: int) -> Tensor:
    """Return float64 [R, 2], the largest score of each row and its token id (exact in float64); of equals the smallest id."""
    if scores.device.type == "cpu":  # NumPy searches with vector instructions, 20 times as fast as torch
        array = scores.numpy()
        best = np.empty((len(array), 2))
        columns = array.argmax(axis=-1)
        best[:, 0] = array[np.arange(len(array)), columns]
        best[:, 1] = columns + vocab_start
        return torch.from_numpy(best)
    values, indices = scores.max(dim=-1)
    return torch.stack((values.double(), (indices + vocab_start).double()), dim=-1)


def _pick(gathered: Tensor, slots: I64Array) -> I32Array:
    """Return the id of the largest score of each row; ``gathered`` is [size, R, 2] from ``_find_best``, smaller ids on lower ranks."""
    pairs = gathered.cpu().numpy()
    winners = pairs[0]
    if len(pairs) > 1:
        best = pairs[:, :, 0].argmax(axis=0)  # the first of equals; NaN wins, so that it is seen here
        winners = pairs[best, np.arange(len(slots))]
    is_finite = np.isfinite(winners[:, 0])
    if not is_finite.all():
        row = int(is_finite.argmin())
        raise InternalError(
            f"the best logit of slot {slots[row]} is {winners[row, 0]}: check the checkpoint for NaN, "
            "and if dtype is float16, which overflows at 65,504, use bfloat16 or float32"
        )
    token_ids: I32Array = winners[:, 1].astype(np.int32)
    return token_ids


def _describe(rows: Tensor, token_ids: I32Array, wanted: I64Array) -> list[RowLogprobs]:
    """Return the log-probabilities under the model's own logits, before penalties and temperature."""
    table = rows.log_softmax(dim=-1)
    chosen = table.gather(1, torch.from_numpy(token_ids.astype(np.int64)).to(rows.device)[:, None])[:, 0].tolist()
    values, ids = table.topk(min(int(wanted.max()), rows.shape[1]), dim=-1)
    tops = [[[i, v] for i, v in zip(*row)] for row in zip(ids.tolist(), values.tolist())]
    return [[logprob, top[:count]] for logprob, top, count in zip(chosen, tops, wanted.tolist())]


def _take_rows(tensor: Tensor, rows: I64Array) -> Tensor:
    """Return some rows of a tensor: the tensor itself when they are all of them."""
    if len(rows) == len(tensor):
        return tensor
    return tensor.index_select(0, torch.from_numpy(rows).to(tensor.device))
