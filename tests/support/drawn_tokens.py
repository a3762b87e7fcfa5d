"""What an engine draws after one prompt, thousands of times, and the distribution that a Transformers model gives it."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from torch import Tensor

import zspmd

from .engines import complete
from .speculated_chains import make_chain

_MOST_COMPLETIONS = 128  # of a request
_CONTEXTS = 8192  # computed at once


async def draw_tokens(engine: zspmd.Engine, prompt: list[int], num_draws: int, *, first_seed: int = 0, **params: Any) -> Tensor:
    """Return int64 [num_draws, max_tokens], what seeded completions of a prompt say; ``params`` are fields of ``SamplingParams``."""
    num_requests = -(-num_draws // _MOST_COMPLETIONS)
    outputs = await asyncio.gather(
        *(
            complete(engine, prompt, zspmd.SamplingParams(seed=first_seed + i, n=_MOST_COMPLETIONS, ignore_eos=True, **params))
            for i in range(num_requests)
        )
    )
    return torch.tensor([completion.token_ids for output in outputs for completion in output.outputs])[:num_draws]


def pair_distribution(model: Any, prompt: list[int], at: int, **filters: Any) -> Tensor:
    """Return float64 [V * V], how likely each pair of tokens is at ``at`` and ``at + 1`` of those generated.

    Args:
        model: of Transformers.
        filters: temperature, top_k, top_p.
    """
    vocab_size = model.config.vocab_size
    contexts, weights = torch.tensor([prompt]), torch.ones(1, dtype=torch.float64)
    for _ in range(at + 2):
        logits = torch.cat([model(part).logits[:, -1] for part in torch.split(contexts, _CONTEXTS)])
        joint = weights[:, None] * make_chain(logits, **filters)
        rows, tokens = joint.nonzero(as_tuple=True)
        contexts = torch.cat((contexts[rows], tokens[:, None]), dim=1)
        weights = joint[rows, tokens]
    pairs = contexts[:, -2] * vocab_size + contexts[:, -1]
    return torch.zeros(vocab_size**2, dtype=torch.float64).index_add_(0, pairs, weights)
