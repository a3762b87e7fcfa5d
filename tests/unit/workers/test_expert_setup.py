"""How the experts of a model worker are reached, by its layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_checkpoint
from torch import Tensor

from zspmd.config import ParallelConfig
from zspmd.errors import ConfigError
from zspmd.model_config import ModelConfig, read_model_config
from zspmd.models.expert_all_to_all import AllToAllExchange
from zspmd.models.expert_axis import ExpertAxis
from zspmd.models.expert_gather import GatherExchange
from zspmd.topology import AxisGroup, axis_group
from zspmd.workers.communicators.solo import SoloCommunicator
from zspmd.workers.expert_setup import ExpertSettings, build_expert_axis

SHARED = ParallelConfig(tp=2, dp=2, ep=4)


class StandInMesh:
    """The groups of a rank, and which of them it has asked a communicator of."""

    def __init__(self, parallel: ParallelConfig, rank: int) -> None:
        self.parallel = parallel
        self.asked: set[str] = set()
        self._rank = rank

    def group(self, axis: str) -> AxisGroup:
        return axis_group(self.parallel, axis, self._rank)

    def __getitem__(self, axis: str) -> SoloCommunicator:
        self.asked.add(axis)
        return SoloCommunicator(self.group(axis))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory: Path = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory, "mixtral")
    return read_model_config(directory)


def build(config: ModelConfig, parallel: ParallelConfig, rank: int = 3, **settings: Any) -> tuple[ExpertAxis, set[str]]:
    """Return the axis of a rank, and the mesh axes that it made communicators on."""
    mesh: Any = StandInMesh(parallel, rank)
    chosen = ExpertSettings(**{"num_redundant": 0, "placements": [], "dispatch": "auto", **settings})
    return build_expert_axis(config, mesh, chosen, dtype=torch.float32, device=torch.device("cpu")), mesh.asked


def test_experts_of_one_replica_take_no_other_axis(config: ModelConfig) -> None:
    axis, asked = build(config, ParallelConfig(tp=2, dp=2))
    assert (axis.rank, axis.size, axis.is_lockstep, asked) == (1, 2, False, {"tp"})


@pytest.mark.parametrize(
    ("dispatch", "kind", "axes"),
    [
        pytest.param("gather", GatherExchange, {"tp", "dp"}, id="gather"),
        pytest.param("all_to_all", AllToAllExchange, {"tp", "ep"}, id="all-to-all"),
        pytest.param("auto", None, {"tp", "dp", "ep"}, id="auto"),
    ],
)
def test_experts_of_all_replicas_take_what_the_exchange_needs(
    config: ModelConfig, dispatch: str, kind: type | None, axes: set[str]
) -> None:
    axis, asked = build(config, SHARED, dispatch=dispatch)
    assert (axis.rank, axis.size, axis.is_lockstep, asked) == (3, 4, True, axes)
    assert kind is None or type(axis._exchange) is kind


@pytest.mark.parametrize(
    ("parallel", "rank", "replicas", "axes"),
    [
        pytest.param(ParallelConfig(dp=4, ep=2), 2, slice(2, 4), {"tp", "ep"}, id="dp 4"),
        pytest.param(ParallelConfig(tp=2, dp=4, ep=4), 3, slice(0, 2), {"tp", "ep"}, id="tp 2 x dp 4"),
        pytest.param(ParallelConfig(tp=2, pp=2, dp=4, ep=4), 14, slice(2, 4), {"tp", "ep"}, id="tp 2 x pp 2 x dp 4"),
        pytest.param(SHARED, 3, slice(0, 2), {"tp", "dp", "ep"}, id="all"),
    ],
)
def test_some_replicas_share_experts(
    config: ModelConfig, parallel: ParallelConfig, rank: int, replicas: slice, axes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And do nothing where none of them has work."""
    seen: list[Sequence[int]] = []
    for kind in (GatherExchange, AllToAllExchange):
        monkeypatch.setattr(kind, "run", lambda self, x, counts, *rest: seen.append(counts))
    axis, asked = build(config, parallel, rank)
    assert asked == axes
    counts = list(range(1, parallel.dp + 1))
    axis.begin_step(counts)
    axis.run(torch.empty(3), lambda x, first: (x, x), lambda x, weights, copies: x)
    axis.begin_step([0 if number in counts[replicas] else number for number in counts])
    assert len(axis.run(torch.empty(0), lambda x, first: (x, x), lambda x, weights, copies: x)) == 0
    assert seen == [counts[replicas]]


def test_auto_sends_rows_where_many_tokens_are_computed(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []

    def run(exchange: object, x: Tensor, *rest: object) -> Tensor:
        used.append(type(exchange).__name__)
        return x

    for kind in (GatherExchange, AllToAllExchange):
        monkeypatch.setattr(kind, "run", run)
    axis, _ = build(config, SHARED)
    for counts in ([2047, 0], [10_000, 3], [16, 16]):  # a row has 256 B, and each token saves half a row
        axis.begin_step(counts)
        axis.run(torch.empty(0), lambda x, first: (x, x), lambda x, weights, copies: x)
    assert used == ["GatherExchange", "AllToAllExchange", "GatherExchange"]


def test_layers_begin_with_what_the_driver_says(config: ModelConfig) -> None:
    axis, _ = build(config, SHARED, num_redundant=1, placements=[[1, 6, 5, 4, 3, 2, 1, 0, 0]])
    assert axis.placement(0, 7) == (0, 1, 2, 3, 4, 5, 6, 0)
    assert axis.placement(1, 7) == (6, 5, 4, 3, 2, 1, 0, 0)
    with pytest.raises(ConfigError, match="a placement of 7 copies; it must have 8, of 7 experts"):
        build(config, SHARED, num_redundant=1, placements=[[1, *range(7)]])
