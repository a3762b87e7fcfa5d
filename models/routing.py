"""Which experts a token goes to, and with what weights. Every rank routes every token: equal hidden states give equal choices.

T tokens, D model, X experts, G groups, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..mixture_config import MixtureConfig
from .layers import ColumnParallelLinear, ColumnPart, ShardedModule, WeightShard, empty_parameter

_TINY = 1e-20  # keeps a token whose sigmoids are all 0 from dividing by 0, as the reference does


class Router(ShardedModule):
    """A token's ``top_k`` experts by their scores; replicated on all ranks, in float32 whatever the model's dtype.

    Args:
        prefix: name of the router in the checkpoint.
        mixture: its variants.
        in_size: D.
        device: where the weights live.
    """

    def __init__(self, prefix: str, mixture: MixtureConfig, in_size: int, *, device: torch.device) -> None:
        super().__init__()
        self.mixture = mixture
        part = ColumnPart(prefix, 0, mixture.num_experts)
        self.score = ColumnParallelLinear([part], in_size, bias=False, dtype=torch.float32, device=device)
        self.bias_name = f"{prefix}.e_score_correction_bias"
        has_bias = mixture.has_correction_bias
        self.correction_bias = empty_parameter(mixture.num_experts, dtype=torch.float32, device=device) if has_bias else None

    def shards(self) -> Iterator[WeightShard]:
        if self.correction_bias is not None:
            yield WeightShard(self.bias_name, self.correction_bias, slice(0, self.mixture.num_experts), (slice(None),))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights, float32 [T, k], and the experts, int64 [T, k], of tokens ``x`` [T, D]."""
        mixture = self.mixture
        logits = self.score.forward(x.float())  # [T, X]
        scores = logits.sigmoid() if mixture.scoring == "sigmoid" else logits.softmax(-1)
        merits = scores if self.correction_bias is None else scores + self.correction_bias
        if mixture.num_top_groups < mixture.num_groups:
            merits = self._within_top_groups(merits)
        weights, experts = merits.topk(mixture.top_k, -1)
        if self.correction_bias is not None:
            weights = scores.gather(1, experts)
        if mixture.normalizes:
            weights = weights / weights.sum(-1, keepdim=True).add_(_TINY)
        return (weights if mixture.scaling_factor == 1 else weights * mixture.scaling_factor), experts

    def _within_top_groups(self, merits: Tensor) -> Tensor:
        """Put the experts outside the best groups out of reach."""
        grouped = merits.view(len(merits), self.mixture.num_groups, -1)  # [T, G, X / G]
        merit_of_groups = grouped.amax(-1) if self.correction_bias is None else grouped.topk(2, -1).values.sum(-1)
        best = merit_of_groups.topk(self.mixture.num_top_groups, -1).indices
        is_outside = torch.ones_like(merit_of_groups, dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(is_outside[..., None], -torch.inf).flatten(1)
