"""Which copy of an expert a token goes to: a pure function of the token's place in the step and of the expert, equal on all ranks.

The copies of an expert take its tokens in turn. T tokens, k experts a token, X experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..expert_placement import Placement


class ExpertCopies:
    """Finds copies by a placement.

    Args:
        placement: the expert of each copy; each of the ``num_experts`` has one at least.
        device: of the choices.
    """

    def __init__(self, placement: Placement, num_experts: int, device: torch.device) -> None:
        copies_of: list[list[int]] = [[] for _ in range(num_experts)]
        for copy, expert in enumerate(placement):
            copies_of[expert].append(copy)
        most = max(map(len, copies_of))
        self.is_plain = placement == tuple(range(num_experts))
        padded = [copies + copies[:1] * (most - len(copies)) for copies in copies_of]
        self._copies = torch.tensor(padded, device=device)  # [X, most]
        self._counts = torch.tensor([len(copies) for copies in copies_of], device=device)

    def choose(self, experts: Tensor, first: int) -> Tensor:
        """Return the copies, int64 [T, k], that tokens go to.

        Args:
            experts: int64 [T, k], their choices.
            first: place of the first of them among the tokens of the step.
        """
        if self.is_plain:
            return experts
        if self._copies.shape[1] == 1:
            return self._copies[experts, 0]
        turns = torch.arange(first, first + len(experts), device=experts.device)[:, None]
        return self._copies[experts, turns % self._counts[experts]]
