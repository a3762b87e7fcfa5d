"""Our paged attention as one of the attention functions that Transformers' models can call.

A model calls the function once a layer with queries, keys and values of all rows of the step. What it needs of the step comes as a
keyword that the model hands on untouched. To see what attention a model wants, it is run once with ``TRIAL`` in place of ``PAGED``: then
nothing is attended to, and what each layer asks for is written down, its mask too.

T tokens, H heads and K kv heads of this rank, E head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import CheckpointError
from .attention import AttendLayer, KvLayer

PAGED, TRIAL = "zspmd", "zspmd-trial"
STEP = "zspmd_step"  # the keyword
_IGNORED = ("position_ids", "use_cache", "is_causal", "output_attentions", STEP)
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Batch, head, query and key indices -> whether the query sees the key."""


@dataclass(frozen=True)
class HeadShare:
    """The heads of one rank.

    Args:
        num_heads, num_kv_heads: of this rank.
        head_dim: E.
        rank: the rank's place on the tensor-parallel axis.
        size: the ranks of that axis.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rank: int
    size: int

    def take(self, states: Tensor, num_own: int) -> Tensor | None:
        """Return this rank's heads of ``states`` [1, heads, T, E], which has them alone or those of all ranks; None for anything else."""
        if states.shape[0] != 1 or states.shape[3] != self.head_dim or states.shape[1] not in (num_own, num_own * self.size):
            return None
        return states[0] if states.shape[1] == num_own else states[0, self.rank * num_own : (self.rank + 1) * num_own]


@dataclass(frozen=True)
class PagedStep:
    """What the layers need of a step.

    Args:
        heads: of this rank.
        first_layer: whose cache is ``kv_cache[0]``.
        windows: of the own layers: how many of the latest positions a token sees, None for all.
        attends: the attention of the step, by window.
        kv_cache: of the own layers.
    """

    heads: HeadShare
    first_layer: int
    windows: Sequence[int | None]
    attends: Mapping[int | None, AttendLayer]
    kv_cache: Sequence[KvLayer]


@dataclass
class Trial:
    """What the layers of a model have asked for, by layer in the order of their calls."""

    heads: HeadShare
    windows: list[tuple[int, int | None]] = field(default_factory=list)


@dataclass(frozen=True)
class MaskRequest:
    """Stands in the trial for the mask that the model wants."""

    mask: Mask


def attend_paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return [1, T, H, E]: the attention of all rows of the step, as Transformers' interface has it."""
    step: PagedStep = others[STEP]
    layer: int = module.layer_idx - step.first_layer  # type: ignore[assignment, operator]
    heads = step.heads
    own = heads.take(query, heads.num_heads)
    keys, values = heads.take(key, heads.num_kv_heads), heads.take(value, heads.num_kv_heads)
    if own is None or keys is None or values is None or sliding_window != step.windows[layer]:
        raise CheckpointError(f"layer {module.layer_idx} asks for another attention than it did when the model was tried out")
    rows = own.transpose(0, 1)  # [T, H, E]
    factor = 1.0 if scaling is None else scaling * math.sqrt(heads.head_dim)  # ours is 1 / sqrt(E)
    if not math.isclose(factor, 1.0, rel_tol=1e-6):
        rows = rows * factor
    keys_values = torch.cat([keys, values]).transpose(0, 1)  # [T, 2K, E]
    out = step.attends[sliding_window](rows, keys_values, step.kv_cache[layer])
    return out.reshape(1, -1, heads.num_heads, heads.head_dim), None


def attend_trial(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Write down what the layer asks for and return zeros.

    Raises:
        CheckpointError: something that paged attention has not; names the layer.
    """
    trial, layer = others.get(STEP), getattr(module, "layer_idx", None)
    if not isinstance(trial, Trial):
        raise CheckpointError(f"{type(module).__name__} has none of the keywords that the model was given; the model is not supported")
    if not isinstance(layer, int):
        raise CheckpointError(f"{type(module).__name__} has no layer_idx, by which its KV cache is found; the model is not supported")
    heads = trial.heads
    _check_heads(layer, heads, query, key, value)
    odd = [name for name, value in others.items() if name not in _IGNORED and value is not None and value is not False]
    odd += ["dropout"] if dropout else []
    if odd:
        raise CheckpointError(f"layer {layer} asks for {', '.join(odd)} in its attention, which is not supported")
    if not isinstance(attention_mask, MaskRequest):
        kind = type(attention_mask).__name__
        raise CheckpointError(f"layer {layer} has a mask of its own ({kind}); supported are causal ones, with a sliding window or without")
    _check_mask(layer, attention_mask.mask, sliding_window, query.device)
    trial.windows.append((layer, sliding_window))
    return query.new_zeros(1, query.shape[2], heads.num_heads, heads.head_dim), None


def request_mask(*, mask_function: Mask, **_others: object) -> MaskRequest:
    """Return what the trial looks at, in place of a mask."""
    return MaskRequest(mask_function)


def _check_heads(layer: int, heads: HeadShare, query: Tensor, key: Tensor, value: Tensor) -> None:
    if heads.take(query, heads.num_heads) is None or any(heads.take(x, heads.num_kv_heads) is None for x in (key, value)):
        shapes = ", ".join(str(list(states.shape)) for states in (query, key, value))
        raise CheckpointError(
            f"layer {layer} has queries, keys and values of {shapes}; supported are [1, heads, tokens, dims] with {heads.num_heads} heads, "
            f"{heads.num_kv_heads} KV heads and {heads.head_dim} dims on each of {heads.size} ranks"
        )


def _check_mask(layer: int, mask: Mask, window: int | None, device: torch.device) -> None:
    """Compare the mask with the one that our attention has, at places on both sides of each edge."""
    edges = [0, 1, 2, 3, 100, 9_000, 100_000]
    edges += [] if window is None else [window - 1, window, window + 1, 2 * window, 3 * window + 1]
    places = torch.tensor(sorted({max(0, edge) for edge in edges}), device=device)
    query, key = places[:, None], places[None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    wanted = key <= query
    if window is not None:
        wanted = wanted & (key > query - window)
    try:
        found = mask(zero, zero, query, key).expand_as(wanted)
    except (IndexError, RuntimeError) as error:  # a mask that looks up places which this sequence has not
        raise CheckpointError(f"layer {layer} has a mask that does not depend on positions alone ({error}); it is not supported") from error
    if not torch.equal(found, wanted):
        what = "causal" if window is None else f"that of a sliding window of {window}"
        raise CheckpointError(f"layer {layer} has a mask that is not {what}; no other is supported")


AttentionInterface.register(PAGED, attend_paged)
AttentionInterface.register(TRIAL, attend_trial)
AttentionMaskInterface.register(TRIAL, request_mask)  # PAGED has none: without it Transformers makes no mask at all
