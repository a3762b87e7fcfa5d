"""Trying a Transformers model out before the first request: which attention it wants, and whether rows keep to themselves.

Convolutions, recurrent states and whatever else looks from one row at another outside attention would mix sequences that happen to be
computed together. Nothing in a model's class says so surely, so that a few tokens are computed alone and beside others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import CheckpointError
from .attention import AttentionInputs, ChunkSpan
from .transformers_attention import TRIAL, Trial

if TYPE_CHECKING:
    from .transformers_linear import VocabHead
    from .transformers_model import TransformersModel

_FIRST, _SECOND = 3, 2  # tokens of the two sequences
_TOLERANCES = {torch.float32: 1e-3}  # of a row's norm; mixing changes rows by much of it
_HALF_TOLERANCE = 0.1


def try_attention(model: TransformersModel) -> list[int | None]:
    """Return the sliding window of each own layer, None where it has none; ranks call it together.

    Raises:
        CheckpointError: an attention that paged attention has not, or a layer without any.
    """
    trial = Trial(model.heads)
    model.run_trial(_token_ids(model, _FIRST), torch.arange(_FIRST, device=model.device), _hidden(model, _FIRST), trial, TRIAL)
    called = [layer for layer, _ in trial.windows]
    if called != list(model.stage):
        raise CheckpointError(
            f"{model.config.architecture} attends in layers {', '.join(map(str, called)) or 'none'} where each of "
            f"{model.stage.start} to {model.stage.stop - 1} must do so once, in order; it is not supported"
        )
    return [window for _, window in trial.windows]


def try_rows(model: TransformersModel) -> None:
    """Check that a sequence gets the same hidden states alone and beside another, and the same logits from its shard of the head.

    Raises:
        CheckpointError: it does not.
    """
    ids, hidden = _token_ids(model, _FIRST + _SECOND), _hidden(model, _FIRST + _SECOND)
    both = model.forward(ids, _inputs(model, (_FIRST, _SECOND)), model.build_cache(3, 4), hidden)
    alone = model.forward(ids[_FIRST:], _inputs(model, (_SECOND,)), model.build_cache(3, 4), None if hidden is None else hidden[_FIRST:])
    if not _is_close(alone, both[_FIRST:], model.dtype):
        raise CheckpointError(
            f"{model.config.architecture} gives a sequence other hidden states beside another than alone: something besides attention "
            "looks from token to token; it is not supported"
        )
    if model.head is not None and model.communicator.size > 1:
        _try_head(model, model.head, alone)


def _try_head(model: TransformersModel, head: VocabHead, hidden: Tensor) -> None:
    """What the model does with logits must not need those of other ranks."""
    own = model.compute_logits(hidden)[:, : head.num_tokens]
    head.is_gathered = True
    everyone = model.compute_logits(hidden)[:, head.start : head.start + head.num_tokens]
    head.is_gathered = False
    if not torch.equal(own, everyone):
        raise CheckpointError(f"{model.config.architecture} computes a token's logit from those of others; use tp 1")


def _token_ids(model: TransformersModel, count: int) -> Tensor:
    return torch.arange(1, count + 1, device=model.device) % model.config.vocab_size


def _hidden(model: TransformersModel, count: int) -> Tensor | None:
    """Return hidden states for a stage that is not the first: numbers of about 1, the same on all ranks."""
    if model.stage.start == 0:
        return None
    size = model.config.hidden_size
    return torch.arange(count * size, device=model.device, dtype=torch.float32).mul_(0.7).sin_().view(count, size).to(model.dtype)


def _inputs(model: TransformersModel, lengths: tuple[int, ...]) -> AttentionInputs:
    """Return a step of whole prompts, the i-th in block i + 1 of four positions."""
    device = model.device
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    places = torch.cat([torch.arange(length, device=device) for length in lengths])
    blocks = torch.cat([torch.full((length,), i + 1, device=device) for i, length in enumerate(lengths)])
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return AttentionInputs(
        block_size=4,
        positions=places,
        max_length=max(lengths),
        write_blocks=blocks,
        write_places=places,
        chunks=tuple(ChunkSpan(at, n, n, torch.tensor([i + 1], device=device)) for i, (at, n) in enumerate(zip(starts, lengths))),
        decode_start=sum(lengths),
        decode_blocks=nothing.view(0, 0),
        decode_lengths=nothing,
    )


def _is_close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    difference = torch.linalg.vector_norm(one.float() - other.float(), dim=-1)
    return bool((difference <= _TOLERANCES.get(dtype, _HALF_TOLERANCE) * torch.linalg.vector_norm(one.float(), dim=-1)).all())
