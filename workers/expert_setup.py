"""The axis of a model worker's experts, made from the layout and from what the driver says of their copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..expert_dispatch import can_gather, is_all_to_all
from ..expert_placement import check_placement
from ..mixture_config import MixtureConfig
from ..model_config import shares_experts
from ..model_sizes import ModelSizes
from ..models.expert_all_to_all import AllToAllExchange
from ..models.expert_axis import ChosenExchange, Exchange, ExpertAxis
from ..models.expert_gather import GatherExchange
from .mesh import Mesh


class ExpertSettings(NamedTuple):
    """What the driver says of the experts.

    Attributes:
        num_redundant: copies of experts in a layer beyond one of each.
        placements: [layer, the expert of each copy] of layers that do not have their first placement.
        dispatch: as in ``EngineConfig``.
    """

    num_redundant: int
    placements: Sequence[Sequence[int]]
    dispatch: str


def build_expert_axis(config: ModelSizes, mesh: Mesh, settings: ExpertSettings, *, dtype: torch.dtype, device: torch.device) -> ExpertAxis:
    """Return the ranks that share the experts with this one; every rank must call this at the same point of its program.

    Args:
        dtype, device: of the hidden states.

    Raises:
        ConfigError: no placement of the model's experts.
    """
    mixture = config.mixture
    if mixture is None:
        return ExpertAxis(mesh["tp"])
    num_copies = mixture.num_experts + settings.num_redundant
    placements = {layer: check_placement(placement, mixture.num_experts, num_copies) for layer, *placement in settings.placements}
    exchange = None
    if shares_experts(config, mesh.parallel):
        exchange = _build_exchange(mixture, mesh, settings.dispatch, num_copies, config.hidden_size * dtype.itemsize, device)
    return ExpertAxis(mesh["tp"], exchange, num_redundant=settings.num_redundant, placements=placements, replicas=_sharing_replicas(mesh))


def _sharing_replicas(mesh: Mesh) -> slice:
    """Return the replicas that share experts with this one: neighbours, as many as ep has room for."""
    count, replica = max(1, mesh.parallel.ep // mesh.parallel.tp), mesh.group("dp").index
    return slice(replica // count * count, (replica // count + 1) * count)


def _build_exchange(mixture: MixtureConfig, mesh: Mesh, dispatch: str, num_copies: int, row_bytes: int, device: torch.device) -> Exchange:
    communicator, top_k = mesh["tp"], mixture.top_k
    gather = None
    if dispatch != "all_to_all" and can_gather(mesh.parallel):
        has_all = mesh.parallel.ep == mesh.parallel.dp * mesh.parallel.tp
        gather = GatherExchange(communicator, mesh["dp" if has_all else "ep"])
    if gather is not None and dispatch == "gather":
        return gather
    replica = mesh.group("dp").index - _sharing_replicas(mesh).start
    all_to_all = AllToAllExchange(communicator, mesh["ep"], replica, top_k=top_k, num_copies=num_copies, device=device)
    if gather is None:
        return all_to_all

    def is_worth_it(counts: Sequence[int]) -> bool:
        return is_all_to_all(counts, num_ranks=all_to_all.size, tp=communicator.size, top_k=top_k, row_bytes=row_bytes)

    return ChosenExchange(gather, all_to_all, is_worth_it)
