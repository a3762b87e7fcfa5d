"""Which copies of experts the ranks of an engine have, and their move to where the work is, while requests run.

    take_expert_loads --> balance_experts --> for each layer that gains: stage_experts   every rank loads what it lacks
                                                                         change_experts  all of them change, between the same two steps

Both are calls, ordered with the steps like any other, so that every rank changes at the same point of its work; steps go on between them.
A rank that cannot load stops nothing: the layer then stays as it is everywhere.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ...errors import BackpressureError
from ...expert_placement import Placement, balance_experts, copies_of_rank, first_placement, loads_of_ranks
from ...mixture_config import MixtureConfig
from ..driver.group import WorkerGroup
from .ranks import EngineRanks


@dataclass(frozen=True)
class Rebalance:
    """What ``Engine.rebalance_experts`` has done.

    Attributes:
        num_tokens: that experts have had since the last time, over all layers; a token counts for each of its experts.
        num_layers: layers whose experts were moved.
        num_loaded: experts that ranks have loaded for it, in one replica.
        imbalance_before, imbalance_after: work of the busiest rank over that of all on average, the mean over the layers, had the tokens
            been shared out by the old placement, and by the new one; 1 is perfect, 0 stands for no tokens.
    """

    num_tokens: int
    num_layers: int
    num_loaded: int
    imbalance_before: float
    imbalance_after: float


class ExpertBalance:
    """Keeps the placements of an engine's mixture layers and changes them; one at a time.

    Args:
        ranks: who has the experts. Those that replace them begin with the placements of that time.
        mixture: of the model.
        num_redundant: as in ``EngineConfig``.
        num_ranks: that the experts are spread over.
    """

    def __init__(self, ranks: EngineRanks, mixture: MixtureConfig, num_redundant: int, num_ranks: int) -> None:
        self._ranks = ranks
        self._num_ranks = num_ranks
        self._num_experts = mixture.num_experts
        self._placements = dict.fromkeys(mixture.layers, first_placement(mixture.num_experts, num_redundant))
        self._lock = asyncio.Lock()

    async def rebalance(self) -> Rebalance:
        """Count, and move what makes the ranks' work more equal; raises as ``WorkerGroup.call``.

        Cancellation: the layer that is being moved has moved whole or not at all.
        """
        async with self._lock:
            group = self._ranks.group
            loads = await self._take_loads(group)
            wanted = {layer: balance_experts(self._placements[layer], counts, self._num_ranks) for layer, counts in loads.items()}
            moves = {layer: placement for layer, placement in wanted.items() if placement != self._placements[layer]}
            num_loaded = sum(count_new(self._placements[layer], placement, self._num_ranks) for layer, placement in moves.items())
            before = self._imbalance(loads)
            for layer, placement in moves.items():
                await self._move(group, layer, placement)
            num_tokens = sum(map(sum, loads.values()))
            return Rebalance(num_tokens, len(moves), num_loaded, before, self._imbalance(loads))

    async def _take_loads(self, group: WorkerGroup) -> dict[int, list[int]]:
        """Return the tokens that the experts of each layer had since the last time, on all ranks together."""
        loads = {layer: [0] * self._num_experts for layer in self._placements}
        for of_rank in await group.call("take_expert_loads"):
            for layer, *counts in of_rank:
                loads[layer] = [old + new for old, new in zip(loads[layer], counts, strict=True)]
        return loads

    async def _move(self, group: WorkerGroup, layer: int, placement: Placement) -> None:
        await group.call("stage_experts", layer, list(placement))
        before = self._placements[layer]
        self._keep(layer, placement)  # before it is published: ranks that fail meanwhile are replaced by ones that have changed
        try:
            await group.call("change_experts", layer)
        except BackpressureError:  # it was not published
            self._keep(layer, before)
            raise

    def _keep(self, layer: int, placement: Placement) -> None:
        self._placements[layer] = placement
        self._ranks.set_worker_arg("expert_placements", [[number, *each] for number, each in self._placements.items()])

    def _imbalance(self, loads: dict[int, list[int]]) -> float:
        ratios = []
        for layer, counts in loads.items():
            work = loads_of_ranks(self._placements[layer], counts, self._num_ranks)
            ratios.append(max(work) * len(work) / sum(work) if any(work) else 0.0)
        return sum(ratios) / len(ratios)


def count_new(before: Placement, after: Placement, num_ranks: int) -> int:
    """Return how many copies ranks have to load to come from one placement to another."""
    pairs = ((copies_of_rank(before, rank, num_ranks), copies_of_rank(after, rank, num_ranks)) for rank in range(num_ranks))
    return sum(old != new for olds, news in pairs for old, new in zip(olds, news, strict=True))
